"""TokenTrainer: learns the receptive tokens of a teacher, the first stage of the method."""

import logging
import os
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from d2kd.data.classes import check_classes
from d2kd.data.datasets import check_datasets
from d2kd.distillers.receptive_tokens.tokens import dice
from d2kd.engine import CheckpointError, ResumableTrainer
from d2kd.modeling import build_network, load_strictly
from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.engine.train_loop import HookBase
from detectron2.utils import comm

from .config import check_learning, learning_config
from .learner import TokenLearner
from .pictures import MaskPictures

logger = logging.getLogger(__name__)

#: Window (iterations) of the median Dice overlap that is stored in the token file.
_DICE_WINDOW = 20


class TokenTrainer(ResumableTrainer):
    """Trains the tokens of a teacher on its own task and writes `OUTPUT_DIR/tokens.pth` and pictures of the masks.

    Its checkpoints hold tokens and optimizer only, and can be resumed.
    """

    network: TokenLearner

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: the teacher's configuration; its solver is that of `DISTILL.RECEPTIVE_TOKENS.LEARN`.

        Raises:
            UserError: what would fail later, in configuration or data.
        """
        check_learning(cfg)
        super().__init__(learning_config(cfg))

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """Raises UserError for datasets that would fail later."""
        check_datasets(cfg, ("TRAIN",))
        check_classes(cfg, ("TRAIN",))

    @property
    def learner(self) -> TokenLearner:
        """Teacher and tokens."""
        return self.network

    @property
    def detector(self) -> nn.Module:
        """The teacher."""
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

    def build_parts(self) -> None:
        """Makes what keeps the overlaps of the last steps."""
        self._dice: dict[str, deque[float]] = {name: deque(maxlen=_DICE_WINDOW) for name in self.learner.taps}

    def extra_hooks(self) -> list[HookBase | None]:
        """Returns a check of the taps, checkpoints, pictures and the token file, in that order."""
        ret: list[HookBase | None] = [_CheckTaps(), *super().extra_hooks()]
        if comm.is_main_process():
            node = self.cfg.DISTILL.RECEPTIVE_TOKENS.LEARN
            period, records = self.cfg.SOLVER.CHECKPOINT_PERIOD, self.data_loader.records
            self._pictures = MaskPictures(self.cfg, period, records, node.PICTURES)
            ret += [self._pictures, hooks.CallbackHook(after_train=lambda _: self._write_tokens())]
        return ret

    def resume_or_load(self, resume: bool = True) -> None:
        """Continues from the last checkpoint of the output directory if asked to and possible; else tokens are new."""
        if resume:
            self.resume()

    def state_dict(self) -> dict[str, Any]:
        """As in the base class, and which teacher the tokens belong to."""
        own = {"teacher": self.learner.teacher_checksum, "taps": list(self.learner.taps)}
        return {**super().state_dict(), **own, "dice": {name: list(values) for name, values in self._dice.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`.

        Raises:
            CheckpointError: the checkpoint belongs to another teacher, or other taps.
        """
        if state_dict["teacher"] != self.learner.teacher_checksum:
            raise CheckpointError("its tokens were being learned on another teacher (MODEL.WEIGHTS)")
        if state_dict["taps"] != self.learner.taps:
            raise CheckpointError(f"its tokens are of the taps {', '.join(state_dict['taps'])}")
        super().load_state_dict(state_dict)
        for name, values in state_dict.get("dice", {}).items():
            self._dice[name].extend(values)

    def after_step(self) -> None:
        """Keeps the overlap of the last masks, and calls the hooks."""
        for name, values in self._dice.items() if comm.is_main_process() else ():
            values.append(float(self.storage.history(f"loss_dice/{name}").latest()))
        super().after_step()

    def _write_tokens(self) -> None:
        if not self.finished:
            return
        overlaps = self._overlaps()
        self.learner.export_tokens(overlaps, self.max_iter).save(self.result_file)
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
        """Dice overlap by tap, over the last steps; over one batch where a checkpoint of an older version has none."""
        if all(self._dice.values()):
            return {name: float(np.median(values)) for name, values in self._dice.items()}
        seen = self.learner.compute_masks(next(iter(self.data_loader)))
        return {n: float(dice(level.masks)) for n, level in seen.items()}


class _CheckTaps(HookBase):
    """Stops after the first step where a tap has no influence on the teacher's losses."""

    def after_step(self) -> None:
        if self.trainer.iter == self.trainer.start_iter:
            self.trainer.learner.check_gradients()
