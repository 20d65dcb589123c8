"""The teacher: another Detectron2 model with its own configuration, frozen, and outside the student's module tree."""

import contextlib
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from d2kd.config import add_distill_config
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from .architecture import build_network
from .roi_outputs import RegionOutputs, Regions
from .taps import FeatureTaps

logger = logging.getLogger(__name__)

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TeacherError(ValueError):
    """A teacher that cannot be built or loaded."""


class Teacher:
    """A frozen model that gives features of raw images.

    It is a plain object, not a module: so it is in no `state_dict`, no optimiser and no data-parallel wrapper, and
    `train()` of what holds it does not reach it. It prepares images with its own mean, deviation, channel order and
    padding, and its forward pass ends at the deepest tap.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Sequence[str],
        *,
        region_taps: Sequence[tuple[int, str]] = (),
        precision: str = "float32",
        swap_channels: bool = False,
    ) -> None:
        """
        Args:
            model: any Detectron2 model; it is frozen and put in evaluation mode here.
            taps: the features that `features` returns, see `d2kd.modeling.taps`.
            region_taps: taps in the box head of an R-CNN, for `region_features`, each with the stage of the student
                whose regions it gets.
            precision: float32, bfloat16 or float16, the arithmetic of the forward pass.
            swap_channels: the images come in the opposite channel order (RGB / BGR) of what the model wants.

        Raises:
            TapError: the model has no such feature.
            TeacherError: unknown precision.
        """
        if precision not in PRECISIONS:
            raise TeacherError(
                f"DISTILL.TEACHER.PRECISION is {precision!r}; it must be one of {', '.join(PRECISIONS)}."
            )
        self.model = model.eval().requires_grad_(False)
        self.precision = PRECISIONS[precision]
        self.swap_channels = swap_channels
        self._region_outputs = RegionOutputs(model, region_taps) if region_taps else None
        maps = self._region_outputs.in_features if region_taps else []
        self._taps = FeatureTaps(model, [*taps, *maps])

    @property
    def needs_regions(self) -> bool:
        """Whether there are taps that `region_features` gives."""
        return self._region_outputs is not None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self  # frozen: copies of a student (an average of its weights, say) share it

    @torch.no_grad()
    def features(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The tapped features, by tap name, of a batch in Detectron2's input format ("image": uint8 (C, H, W))."""
        inputs = [{k: v for k, v in x.items() if k in ("image", "height", "width")} for x in batched_inputs]
        if self.swap_channels:
            inputs = [{**x, "image": x["image"].flip(0)} for x in inputs]
        with self._autocast(), self._taps.recording(stop_when_done=True) as features:
            self.model(inputs)
        return features

    @torch.no_grad()
    def region_features(self, features: dict[str, Tensor], regions: Regions) -> dict[str, Tensor]:
        """The taps in the box head, (R, C) by name, for regions of the student.

        Args:
            features: what the method `features` returned for the images.
            regions: of these images.
        """
        with self._autocast():
            return self._region_outputs(features, regions)

    def _autocast(self) -> AbstractContextManager:
        device = next(self.model.parameters()).device.type
        if self.precision == torch.float32:
            # also shields the teacher from the student's mixed precision
            return (
                torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
            )
        return torch.autocast(device, dtype=self.precision)


def teacher_config(cfg: CfgNode) -> CfgNode:
    """The teacher's own configuration, on the student's device.

    Raises:
        TeacherError: the file is missing, or is no configuration.
    """
    path = cfg.DISTILL.TEACHER.CONFIG_FILE
    if not PathManager.isfile(path):
        raise TeacherError(f"DISTILL.TEACHER.CONFIG_FILE (--teacher-config) is {path!r}: there is no such file.")
    teacher_cfg = get_cfg()
    add_distill_config(teacher_cfg)
    try:
        teacher_cfg.merge_from_file(path)
        teacher_cfg.merge_from_list(list(cfg.DISTILL.TEACHER.OPTS))
    except (KeyError, ValueError, AssertionError, OSError) as error:
        raise TeacherError(
            f"The teacher's configuration {path} (with DISTILL.TEACHER.OPTS) does not load: {error}"
        ) from error
    teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
    teacher_cfg.MODEL.WEIGHTS = cfg.DISTILL.TEACHER.WEIGHTS or teacher_cfg.MODEL.WEIGHTS
    return teacher_cfg


def load_teacher(teacher_cfg: CfgNode) -> nn.Module:
    """Builds the teacher and loads its weights, all of them.

    Raises:
        TeacherError: the file is missing or broken, or keys are missing, unexpected or of another shape.
        ArchitectureError: its configuration names an architecture that is not there.
    """
    path = teacher_cfg.MODEL.WEIGHTS
    if not path:
        raise TeacherError(
            "The teacher has no weights: set DISTILL.TEACHER.WEIGHTS (--teacher-weights) to its checkpoint."
        )
    try:
        found = PathManager.isfile(PathManager.get_local_path(path.split("?")[0]))
    except Exception as error:
        raise TeacherError(f"DISTILL.TEACHER.WEIGHTS (--teacher-weights) is {path!r}: {error}") from error
    if not found:
        raise TeacherError(f"DISTILL.TEACHER.WEIGHTS (--teacher-weights) is {path!r}: there is no such file.")
    model = build_network(teacher_cfg, "DISTILL.TEACHER.CONFIG_FILE (--teacher-config)")
    load_strictly(model, path, "teacher", "DISTILL.TEACHER.CONFIG_FILE and DISTILL.TEACHER.WEIGHTS")
    return model


class _StrictCheckpointer(DetectionCheckpointer):
    """Keeps what did not fit, for `load_strictly` to judge."""

    problems: Any = None

    def _load_model(self, checkpoint: Any) -> Any:
        self.problems = super()._load_model(checkpoint)
        return self.problems


def load_strictly(model: nn.Module, path: str, who: str, keys: str) -> None:
    """Loads a checkpoint of which every key must fit.

    Args:
        model: takes the weights.
        path: anything that Detectron2's checkpointer reads.
        who: whose weights these are, for messages.
        keys: the configuration keys that decide, for messages.

    Raises:
        TeacherError: the file cannot be read, or a key is missing, unexpected or of another shape.
    """
    checkpointer = _StrictCheckpointer(model)
    incompatible_log = logging.getLogger("fvcore.common.checkpoint")
    level = incompatible_log.level
    incompatible_log.setLevel(logging.ERROR)  # the error below says it all, once
    try:
        checkpointer.load(path, checkpointables=[])
    except Exception as error:
        raise TeacherError(f"The {who}'s checkpoint {path} cannot be read: {error}") from error
    finally:
        incompatible_log.setLevel(level)
    problems = describe_problems(checkpointer.problems)
    if problems:
        raise TeacherError(
            f"The {who}'s checkpoint {path} does not fit its configuration ({keys}):\n" + "\n".join(problems)
        )
    logger.info("Loaded the %s's weights from %s: every key fits.", who, path)


def describe_problems(incompatible: Any, most: int = 8) -> list[str]:
    """Lines on missing, unexpected and mis-shaped keys; empty where all fit."""
    if incompatible is None:
        return []
    shapes = [
        f"{name}: checkpoint {tuple(theirs)}, model {tuple(ours)}"
        for name, theirs, ours in incompatible.incorrect_shapes
    ]
    misshaped = {name for name, *_ in incompatible.incorrect_shapes}
    lines = []
    for title, names in (
        ("missing in the checkpoint", [n for n in incompatible.missing_keys if n not in misshaped]),
        ("not in the model", incompatible.unexpected_keys),
        ("of another shape", shapes),
    ):
        if names:
            more = f" and {len(names) - most} more" if len(names) > most else ""
            lines.append(f"  {len(names)} {title}: {', '.join(sorted(names)[:most])}{more}")
    return lines
