"""Checkpoints: the student under plain Detectron2 keys, everything else that a resumed run needs beside it."""

import logging
import os
import pickle
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from d2kd.data.classes import class_difference, require_same_classes, show_classes
from d2kd.errors import UserError
from d2kd.files import replacing
from d2kd.modeling import DistilledModel, initialize_student
from d2kd.modeling.architectures import architecture_of
from d2kd.modeling.backbone import load_bare_network, load_pretrained_network
from d2kd.modeling.checkpoint_files import SafeCheckpointer, write_checkpoint
from d2kd.modeling.pretrained_names import input_advice, misfit, source_of, to_detectron2, unpacked
from d2kd.modeling.strict_loading import require_finite
from detectron2.config import CfgNode
from detectron2.utils import comm

from .ema import ModelEMA
from .run_settings import compare_settings

logger = logging.getLogger(__name__)

#: What reading a checkpoint that is missing, broken or of another model raises.
_READ_ERRORS = (AssertionError, KeyError, OSError, RuntimeError, ValueError, pickle.UnpicklingError)


class CheckpointError(UserError):
    """A checkpoint that does not belong to the run that wants to continue from it."""


class DistillCheckpointer(SafeCheckpointer):
    """Saves the student as "model", which is all that Detectron2 reads, and beside it what a resumed run needs.

    That is "distillers", "balance", "teacher_passes", "ema" and "trainer" (states), "methods" and "class_names",
    "settings" (see `run_settings`) and "iteration".
    """

    def __init__(
        self,
        student: nn.Module,
        save_dir: str = "",
        *,
        trainer: Any = None,
        distilled: DistilledModel | None = None,
        ema: ModelEMA | None = None,
        methods: Sequence[str] | None = None,
        settings: Mapping[str, Any] | None = None,
        class_names: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """
        Args:
            student: saved and loaded as "model".
            save_dir: where checkpoints lie.
            trainer: saved and loaded by its `state_dict` and `load_state_dict`; None where weights are only read.
            distilled: for runs with a teacher; its distillers, balance and passes are saved and loaded.
            ema: the same, for runs that average the student's weights.
            methods: names of the methods of a run with a teacher; it is only resumed with the same.
            settings: that are compared on resuming, see `run_settings`.
            class_names: of the classes that the student predicts, by kind; only a run with the same is resumed.
        """
        self.about: dict[str, Any] = {
            "methods": None if methods is None else list(methods),
            "settings": dict(settings or {}),
            "class_names": {kind: list(names) for kind, names in (class_names or {}).items()},
        }
        #: settings of the checkpoint that a resumed run has been loaded from, where they differ and have no effect
        self.in_force: dict[str, Any] = {}
        #: whose weights a run has started from, where they are of another project (see `pretrained_names`)
        self.source: str | None = None
        self._started_with: set[str] = set()
        self._started_classes: Mapping[str, Sequence[str]] = {}
        self._resuming = False
        extra: dict[str, Any] = {"trainer": trainer, "ema": ema}
        if distilled is not None:
            passes = distilled.passes if distilled.passes.state_dict() else None
            extra |= {"distillers": distilled.distillers, "balance": distilled.balance, "teacher_passes": passes}
        super().__init__(student, save_dir, **{n: x for n, x in extra.items() if x is not None})

    def save(self, name: str, *, tag: bool = True, **extra: Any) -> None:
        """Writes `name`.pth; all states, `about` and `extra`, with a checksum.

        Args:
            name: file name without ending.
            tag: whether a resumed run continues from it.
            extra: further entries.
        """
        if not self.save_to_disk:
            return
        states = {key: part.state_dict() for key, part in self.checkpointables.items()}
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        write_checkpoint(path, {"model": self.model.state_dict(), **states, **self.about, **extra})
        if tag:
            self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Records which file of the folder a resumed run continues from."""
        with replacing(os.path.join(self.save_dir, "last_checkpoint")) as temporary:
            temporary.write_text(last_filename_basename, encoding="utf-8")

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Continues from the last checkpoint of `save_dir` if `resume` is set and there is one, else loads weights from
        `path`.

        Raises:
            CheckpointError: the last checkpoint has other distillers than this run, or a file cannot be read.
        """
        if not (resume and self.has_checkpoint()):
            try:
                return super().resume_or_load(path, resume=False)
            except _READ_ERRORS as error:
                raise CheckpointError(f"MODEL.WEIGHTS {path} cannot be loaded: {error}") from error
        last = self.get_checkpoint_file()
        self._resuming = True
        try:
            rest = super().resume_or_load(path, resume=True)
        except _READ_ERRORS as error:
            raise CheckpointError(
                f"Cannot resume from {last}: {str(error).rstrip('.')}. If the file is damaged, write the name of an "
                "earlier checkpoint into the file last_checkpoint beside it. If model, methods or taps were changed, "
                "change them back, or start anew in another OUTPUT_DIR."
            ) from error
        finally:
            self._resuming = False
        if "ema" in self.checkpointables and "ema" not in self._loaded:
            logger.warning("%s has no average of the weights (SOLVER.EMA): it starts from the student of now.", last)
            self.checkpointables["ema"].reset()
        return rest

    def advise(self, cfg: CfgNode, given: Collection[str] = ()) -> None:
        """Warns where a configuration does not suit the weights that a run has started from.

        Args:
            cfg: of the run.
            given: names of parameters that have values from elsewhere, of another library or of the teacher.
        """
        advice = None if self.source is None else input_advice(self.source, cfg)
        if advice is not None:
            logger.warning("%s", advice)
        self._advise_on_classes(cfg.MODEL.WEIGHTS, self._started_with - set(given))
        started = self._started_with | set(given)
        frozen = [n for n, p in self.model.named_parameters() if not p.requires_grad and n not in started]
        if frozen:
            logger.warning(
                "%d parameters, first %s, are frozen (MODEL.BACKBONE.FREEZE_AT is %d) with the random values that they "
                "have without weights: MODEL.WEIGHTS %r gives them none. Set FREEZE_AT 0 to train them.",
                len(frozen),
                frozen[0],
                cfg.MODEL.BACKBONE.FREEZE_AT,
                cfg.MODEL.WEIGHTS,
            )

    def _advise_on_classes(self, path: str, started: Collection[str]) -> None:
        for kind, ours in self.about["class_names"].items():
            theirs = self._started_classes.get(kind, ours)
            layers = architecture_of(self.model).class_layers() if class_difference(theirs, ours) else []
            heads = [layer.path for layer in layers if layer.kind == kind and f"{layer.path}.weight" in started]
            if heads:
                logger.warning(
                    "MODEL.WEIGHTS %s was trained for the classes %s, and this run is for %s: %s. %s has what was "
                    "learned for the class of the same number there. To start by name, give that model as the teacher.",
                    path,
                    show_classes(theirs),
                    show_classes(ours),
                    class_difference(theirs, ours),
                    " and ".join(heads),
                )

    def _load_model(self, checkpoint: Any) -> Any:
        self._loaded = set(checkpoint)
        weights = unpacked(checkpoint.pop("model"))
        require_finite(weights)
        checkpoint = {**checkpoint, "model": weights}
        if not self._resuming:
            return self._load_start(checkpoint)
        if "trainer" in self.checkpointables and "trainer" not in self._loaded:
            raise CheckpointError(
                "it has weights alone, as exported ones have, and nothing of a training that could go on (to start one "
                "from them: MODEL.WEIGHTS)"
            )
        if checkpoint.get("methods") != self.about["methods"]:
            raise CheckpointError(
                f"it was written {_with(checkpoint.get('methods'))}, and this run is one {_with(self.about['methods'])}"
            )
        for kind, names in self.about["class_names"].items():
            require_same_classes(checkpoint.get("class_names", {}).get(kind, names), "it", names, "this run")
        self._require_same_model(weights)
        self.in_force = compare_settings(checkpoint.get("settings", {}), self.about["settings"])
        return super()._load_model(checkpoint)

    def _require_same_model(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Another model would go on with some of its parameters as they were initialized, and the optimizer fails."""
        for name, parameter in self.model.named_parameters():
            found = weights.get(name)
            if found is None or found.shape != parameter.shape:
                theirs = "not there" if found is None else f"of the shape {tuple(found.shape)}"
                raise CheckpointError(
                    f"it is of another model, where {name} is {theirs}; this run's has {tuple(parameter.shape)}"
                )

    def _load_start(self, checkpoint: Any) -> Any:
        """Loads the weights that a run starts from; they may be torchvision's or timm's."""
        self._started_classes = checkpoint.get("class_names") or {}
        self._started_with = load_bare_network(self.model, checkpoint["model"])
        if self._started_with:
            return None
        self.source = source_of(checkpoint["model"])
        if self.source is not None:
            placed, left = to_detectron2(checkpoint["model"], self.model.state_dict())
            if placed:
                why = misfit(self.source, checkpoint["model"], self.model.state_dict())
                if why is not None:
                    raise CheckpointError(f"it is of another {self.source}: {why}")
                checkpoint = {**checkpoint, "model": placed, "matching_heuristics": False}
                names = ", ".join(left[:8]) or "none"
                logger.info("Weights of a %s: %d tensors have a place; left out: %s", self.source, len(placed), names)
        example = min(checkpoint["model"], default="none")
        incompatible = super()._load_model(checkpoint)
        bottom_up = f"{architecture_of(self.model).bottom_up}."
        wanted = {name for name, _ in self.model.named_parameters() if name.startswith(bottom_up)}
        failed = {*incompatible.missing_keys, *(name for name, *_ in incompatible.incorrect_shapes)}
        if wanted and wanted <= failed:
            raise CheckpointError(
                f"nothing of it fits the backbone, which has e.g. {min(wanted)}, and the file e.g. {example}. Give "
                f"the weights of this network, under Detectron2's, torchvision's or timm's names, or '' for none"
            )
        self._started_with = set(self.model.state_dict()) - failed
        if incompatible.incorrect_shapes:  # told by the one who reads in lines that are easily overlooked
            logger.warning(
                "Initialized anew, as MODEL.WEIGHTS has them in another shape (for other classes?): %s",
                ", ".join(
                    f"{n} {tuple(ours)}, not {tuple(theirs)}" for n, theirs, ours in incompatible.incorrect_shapes
                ),
            )
        return incompatible


def _with(methods: Sequence[str] | None) -> str:
    if methods is None:
        return "without a teacher"
    return f"with DISTILL.METHODS {list(methods)}"


def load_start(cfg: CfgNode, model: nn.Module, checkpointer: DistillCheckpointer | None = None) -> None:
    """Gives a model the weights that a training starts from, by `MODEL.WEIGHTS` and what libraries have.

    Of a distilled model the student gets them; then its neck and heads are initialized from the teacher's, where
    `DISTILL.INIT_FROM_TEACHER` says so.

    Args:
        cfg: of the run.
        model: that is trained, a `DistilledModel` or its student alone.
        checkpointer: of the student; None makes one.

    Raises:
        UserError: weights cannot be read, or do not fit.
    """
    distilled = model if isinstance(model, DistilledModel) else None
    student = model if distilled is None else distilled.student
    checkpointer = DistillCheckpointer(student) if checkpointer is None else checkpointer
    pretrained = load_pretrained_network(cfg, student)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
    taken = None if distilled is None else initialize_student(cfg, distilled)
    checkpointer.advise(cfg, {*pretrained, *(taken.copied if taken is not None else ())})


def write_weights(path: str, model: nn.Module, **extra: Any) -> None:
    """Writes {"model": state dict, **extra}; `last_checkpoint` stays as it is."""
    write_checkpoint(path, {"model": model.state_dict(), **extra})


def process_state(model: nn.Module) -> dict[str, Any]:
    """Returns what differs between processes: random states and loss normalizers, in types that load safely."""
    numpy_state = np.random.get_state()
    assert isinstance(numpy_state, tuple)
    return {
        "python": random.getstate(),
        "numpy": [numpy_state[0], torch.from_numpy(numpy_state[1].astype(np.int64)), *numpy_state[2:]],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "running": architecture_of(model).loss_normalizers(),
    }


def load_process_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Restores what `process_state` has returned."""
    random.setstate(_as_tuple(state["python"]))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    # version 0.1 wrote ".loss_normalizer"
    normalizers = {name.removeprefix("."): value for name, value in state["running"].items()}
    architecture_of(model).load_loss_normalizers(normalizers)


def gather_process_states(model: nn.Module) -> list[dict[str, Any]]:
    """Returns `process_state` of every process, on every process; all must call it."""
    return comm.all_gather(process_state(model))


def broadcast_buffers(model: nn.Module) -> None:
    """Broadcasts module buffers, such as batch statistics, from the main process: they are what a checkpoint keeps."""
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def _as_tuple(state: Any) -> Any:
    return tuple(_as_tuple(x) for x in state) if isinstance(state, (list, tuple)) else state
