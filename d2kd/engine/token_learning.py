"""Learning receptive tokens: the first stage of the method, on the teacher alone."""

import itertools
import logging
import os
from typing import Any

import numpy as np
import torch
from torch import nn

from d2kd.config import ConfigError
from d2kd.files import replacing
from d2kd.layers.tokens import dice
from d2kd.modeling import TokenLearner, build_network, load_strictly
from d2kd.visualization.tokens import MaskRow, mask_picture
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.engine import hooks
from detectron2.engine.train_loop import HookBase
from detectron2.utils import comm

from .hooks import CheckpointHook, InterruptHook
from .trainer import DistillTrainer

logger = logging.getLogger(__name__)

#: The learning rate falls to this along a cosine, as in the official code.
_LAST_LR = 1e-6
#: Steps over which the Dice overlap that a token file tells is the median.
_DICE_WINDOW = 20
#: A mask that varies by less over an image says nothing about places.
_FLAT = 0.1


def learning_config(cfg: CfgNode) -> CfgNode:
    """The configuration of the first stage from a teacher's: its model and data, the schedule of `LEARN`.

    Raises:
        ConfigError: `cfg` is a student's, or has no weights, or a number of `LEARN` is out of range.
    """
    if cfg.DISTILL.TEACHER.CONFIG_FILE:
        raise ConfigError(
            "Tokens are learned on the teacher alone: --config-file must be the teacher's own YAML (now "
            f"DISTILL.TEACHER.CONFIG_FILE is {cfg.DISTILL.TEACHER.CONFIG_FILE!r}), MODEL.WEIGHTS its checkpoint."
        )
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError("The teacher has no weights: set MODEL.WEIGHTS to its checkpoint.")
    learn, cfg = cfg.DISTILL.RECEPTIVE_TOKENS.LEARN, cfg.clone()
    _check_numbers(learn)
    cfg.defrost()
    solver = cfg.SOLVER
    solver.OPTIMIZER, solver.BASE_LR, solver.WEIGHT_DECAY = learn.OPTIMIZER, learn.BASE_LR, learn.WEIGHT_DECAY
    solver.MAX_ITER, solver.CHECKPOINT_PERIOD = learn.ITERATIONS, learn.PERIOD
    solver.LR_SCHEDULER_NAME, solver.BASE_LR_END = "WarmupCosineLR", min(_LAST_LR, learn.BASE_LR)
    solver.WARMUP_ITERS, solver.WEIGHT_DECAY_BIAS, solver.BIAS_LR_FACTOR, solver.LAYER_DECAY = 0, None, 1.0, 1.0
    solver.EMA.ENABLED = False
    cfg.TEST.AUG.ENABLED, cfg.TEST.BEST_CHECKPOINT.METRIC, cfg.TEST.EARLY_STOP.PATIENCE = False, "", 0
    cfg.freeze()
    return cfg


def _check_numbers(learn: CfgNode) -> None:
    for key, fits, rule in (
        ("NUM_TOKENS", learn.NUM_TOKENS >= 1, "at least 1"),
        ("ITERATIONS", learn.ITERATIONS >= 1, "at least 1"),
        ("BASE_LR", learn.BASE_LR > 0, "above 0"),
        ("WEIGHT_DECAY", learn.WEIGHT_DECAY >= 0, "at least 0"),
        ("PICTURES", learn.PICTURES >= 0, "at least 0"),
    ):
        if not fits:
            raise ConfigError(f"DISTILL.RECEPTIVE_TOKENS.LEARN.{key} is {learn[key]}; it must be {rule}.")


class TokenTrainer(DistillTrainer):
    """Trains the tokens of a teacher on its own task and writes `OUTPUT_DIR/tokens.pth` and pictures of the masks.

    Its checkpoints hold tokens and optimiser only, and can be resumed.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: the teacher's configuration; see `learning_config`.
        """
        super().__init__(learning_config(cfg))

    @property
    def learner(self) -> TokenLearner:
        """Teacher and tokens."""
        return self.student

    @property
    def running_model(self) -> nn.Module:
        return self.learner.teacher

    @property
    def result_file(self) -> str:
        """Where the tokens go."""
        return os.path.join(self.cfg.OUTPUT_DIR, "tokens.pth")

    @classmethod
    def build_model(cls, cfg: CfgNode) -> TokenLearner:
        """The teacher with all of its weights, and new tokens."""
        with torch.random.fork_rng(devices=[]):
            teacher = build_network(cfg, "--config-file")
        load_strictly(teacher, cfg.MODEL.WEIGHTS, "teacher", "--config-file and MODEL.WEIGHTS")
        node = cfg.DISTILL.RECEPTIVE_TOKENS
        learner = TokenLearner(
            teacher, node.TEACHER_TAPS or node.TAPS, node.LEARN.NUM_TOKENS, weighting=node.LEARN.WEIGHTING
        )
        logger.info("Learning %d tokens for each of %s", node.LEARN.NUM_TOKENS, ", ".join(learner.taps))
        return learner

    def build_hooks(self) -> list[HookBase | None]:
        """Timing, schedule, checkpoints, pictures, the token file and writers, in that order."""
        ret: list[HookBase | None] = [
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            self._wall_time,
            _CheckTaps(),
            CheckpointHook(self.cfg.SOLVER.CHECKPOINT_PERIOD),
            InterruptHook(self._trainer),
        ]
        if comm.is_main_process():
            node = self.cfg.DISTILL.RECEPTIVE_TOKENS.LEARN
            shown = list(itertools.islice(self.data_loader.records, node.PICTURES))
            self._pictures = MaskPictures(self.cfg, node.PERIOD, shown)
            ret.append(self._pictures)
            ret.append(hooks.CallbackHook(after_train=lambda _: self._write_tokens()))
            ret.append(hooks.PeriodicWriter(self.build_writers(), period=20))
        return ret

    def resume_or_load(self, resume: bool = True) -> None:
        """Continues from the last checkpoint of the output directory if asked to and possible; else tokens are new."""
        if resume and self.checkpointer.has_checkpoint():
            super().resume_or_load(resume=True)

    def state_dict(self) -> dict[str, Any]:
        """As in the base class, and which teacher the tokens belong to."""
        return {**super().state_dict(), "teacher": self.learner.teacher_checksum, "taps": list(self.learner.taps)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`.

        Raises:
            ValueError: the checkpoint belongs to another teacher, or other taps.
        """
        if state_dict["teacher"] != self.learner.teacher_checksum:
            raise ValueError("its tokens were being learned on another teacher (MODEL.WEIGHTS)")
        if state_dict["taps"] != self.learner.taps:
            raise ValueError(f"its tokens are of the taps {', '.join(state_dict['taps'])}")
        super().load_state_dict(state_dict)

    def _write_tokens(self) -> None:
        if not self.finished:
            return
        overlaps = self._overlaps()
        self.learner.learned(overlaps, self.max_iter).save(self.result_file)
        for name, overlap in overlaps.items():
            logger.info("Tokens of %s: Dice overlap %.3f", name, overlap)
        flat = self._pictures.flat_taps()
        if flat:
            logger.warning(
                "Most masks of %s are the same all over an image, see %s. A lower "
                "DISTILL.RECEPTIVE_TOKENS.LEARN.BASE_LR, or LEARN.WEIGHTING False, may help.",
                ", ".join(flat),
                self._pictures.directory,
            )
        logger.info("Wrote %s: the DISTILL.RECEPTIVE_TOKENS.FILE of students of this teacher", self.result_file)

    def _overlaps(self) -> dict[str, float]:
        """Dice overlap by tap, over the last steps; over one batch where an interrupted run has made all steps."""
        if self.start_iter < self.max_iter:
            return {n: float(self.storage.history(f"loss_dice/{n}").median(_DICE_WINDOW)) for n in self.learner.taps}
        seen = self.learner.look(next(iter(self.data_loader)))
        return {n: float(dice(level.masks)) for n, level in seen.items()}


class _CheckTaps(HookBase):
    """Stops after the first step where a tap has no influence on the teacher's losses."""

    def after_step(self) -> None:
        if self.trainer.iter == self.trainer.start_iter:
            self.trainer.learner.check_reached()


class MaskPictures(HookBase):
    """Draws the masks over a few training images: as PNG files, and into the event storage (TensorBoard)."""

    def __init__(self, cfg: CfgNode, period: int, dicts: list[dict[str, Any]]) -> None:
        """
        Args:
            cfg: of the teacher; decides size and channel order of its input.
            period: iterations between pictures; there are some at the end in any case. 0 or less draws only those.
            dicts: the images, in Detectron2's format.
        """
        self.period = period
        self.directory = os.path.join(cfg.OUTPUT_DIR, "masks")
        self.image_format = cfg.INPUT.FORMAT
        self.dicts = dicts
        self._range: dict[str, np.ndarray] = {}
        self.mapper = DatasetMapper(cfg, is_train=False)

    def after_step(self) -> None:
        """Draws where it is time."""
        done = self.trainer.iter + 1
        if done >= self.trainer.max_iter:
            self.draw("final")
        elif self.period > 0 and done % self.period == 0:
            self.draw(f"{done:07d}")

    def draw(self, name: str) -> None:
        """Writes `masks/<name>_<number of the image>.png`."""
        import cv2

        self._range.clear()
        for number, record in enumerate(self.dicts):
            data = self.mapper(dict(record))
            picture = mask_picture(_bgr(data["image"], self.image_format), self._rows(data))
            with replacing(os.path.join(self.directory, f"{name}_{number}.png")) as path:
                cv2.imwrite(str(path), picture)
            rgb = torch.from_numpy(np.ascontiguousarray(picture[..., ::-1].transpose(2, 0, 1)))
            self.trainer.storage.put_image(f"masks/{number}", rgb)

    def _rows(self, data: dict[str, Any]) -> dict[str, MaskRow]:
        inputs = [{key: data[key] for key in ("image", "height", "width")}]
        rows = {}
        for tap, seen in self.trainer.learner.look(inputs).items():
            row = rows[tap] = MaskRow(seen.masks[0].cpu().numpy(), seen.gate[0].cpu().numpy(), seen.stride)
            if row.gate.size > 1:
                self._range[tap] = np.maximum(self._range.get(tap, 0.0), np.ptp(row.masks, axis=(1, 2)))
        return rows

    def flat_taps(self) -> list[str]:
        """Taps (of more than one cell) of which most masks varied by less than 0.1 in every image, when last drawn."""
        return [tap for tap, ranges in self._range.items() if (ranges < _FLAT).mean() > 0.5]


def _bgr(image: torch.Tensor, image_format: str) -> np.ndarray:
    array = image.byte().permute(1, 2, 0).cpu().numpy()
    return np.ascontiguousarray(array[..., ::-1] if image_format == "RGB" else array)
