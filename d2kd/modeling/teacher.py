"""The teacher: another Detectron2 model with its own configuration, frozen, and outside the student's module tree."""

import contextlib
import copy
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from d2kd.config import get_key
from d2kd.config_reader import read_config
from d2kd.errors import ConfigError, UserError, require_choice
from d2kd.files import near_configs
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from .architectures import architecture_class, build_network, warn_if_unknown
from .backbone import load_pretrained_network
from .classes import Classes, classes_of
from .strict_loading import load_strictly
from .taps import FeatureTaps

logger = logging.getLogger(__name__)

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: A batch in Detectron2's input format.
BatchedInputs = list[dict[str, Any]]


class TeacherError(UserError):
    """A teacher that cannot be built or loaded."""


class Teacher:
    """A frozen model, ready to compute features of raw images; `d2kd.modeling.teacher_passes` says which, and how.

    It is a plain object, not a module: so it is in no `state_dict`, no optimizer and no data-parallel wrapper, and
    `train()` of what holds it does not reach it. It prepares images with its own mean, deviation, channel order and
    padding.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: Mapping[str, Classes] | None = None,
        *,
        precision: str = "float32",
        swap_channels: bool = False,
    ) -> None:
        """
        Args:
            model: any Detectron2 model; it is frozen and put in evaluation mode here.
            classes: what it predicts, by kind (see `d2kd.modeling.classes`); None where that is not known.
            precision: float32, bfloat16 or float16, the arithmetic of the forward pass.
            swap_channels: the images come in the opposite channel order (RGB / BGR) of what the model wants.

        Raises:
            ConfigError: unknown precision.
        """
        require_choice("DISTILL.TEACHER.PRECISION", precision, PRECISIONS)
        self.model = model.eval().requires_grad_(False)
        self.classes = dict(classes or {})
        self.precision = PRECISIONS[precision]
        self.swap_channels = swap_channels

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self  # frozen: copies of a student (an average of its weights, say) share it

    def sharing(self, model: nn.Module) -> "Teacher":
        """Returns a teacher like this one in all but the network; such as a faster copy of its own."""
        other = copy.copy(self)
        other.model = model.eval().requires_grad_(False)
        return other

    def in_float32(self) -> "Teacher":
        """Returns this teacher with the arithmetic of float32."""
        other = copy.copy(self)
        other.precision = torch.float32
        return other

    @torch.no_grad()
    def record(self, batched_inputs: BatchedInputs, taps: FeatureTaps) -> dict[str, Tensor]:
        """Returns tapped features of a batch in Detectron2's input format; the pass ends at the deepest tap."""
        with self.autocast(), taps.recording(stop_when_done=True) as features:
            self.model(self.prepare(batched_inputs))
        return features

    def prepare(self, batched_inputs: BatchedInputs) -> BatchedInputs:
        """Returns the images of a batch ("image": uint8 (C, H, W)) in the teacher's channel order, without truth."""
        inputs = [{k: v for k, v in x.items() if k in ("image", "height", "width")} for x in batched_inputs]
        return [{**x, "image": x["image"].flip(0)} for x in inputs] if self.swap_channels else inputs

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the context for the teacher's arithmetic, whatever that of the student."""
        device = next(self.model.parameters()).device.type
        if self.precision != torch.float32:
            return torch.autocast(device, dtype=self.precision)
        # also shields the teacher from the student's mixed precision
        return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def read_teacher_config(cfg: CfgNode, notices: list[str] | None = None) -> CfgNode:
    """Returns the teacher's configuration as its file and `DISTILL.TEACHER.OPTS` give it.

    Args:
        cfg: of the student.
        notices: see `read_config`.

    Raises:
        TeacherError: the file is missing, or is no configuration, or a value is wrong.
    """
    path = cfg.DISTILL.TEACHER.CONFIG_FILE
    if not PathManager.isfile(path):
        raise TeacherError(
            f"DISTILL.TEACHER.CONFIG_FILE (--teacher-config) is {path!r}: there is no such file.{near_configs(path)}"
        )
    try:
        return read_config(path, cfg.DISTILL.TEACHER.OPTS or (), source="DISTILL.TEACHER.OPTS", notices=notices)
    except ConfigError as error:
        raise TeacherError(
            f"The teacher's configuration {path} (--teacher-config, with DISTILL.TEACHER.OPTS) does not load: {error}"
        ) from error


def teacher_config(cfg: CfgNode) -> CfgNode:
    """Returns the teacher's own configuration, on the student's device and with its limits on detections.

    Raises:
        TeacherError: see `read_teacher_config`.
    """
    teacher_cfg = read_teacher_config(cfg)
    teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
    teacher_cfg.MODEL.WEIGHTS = cfg.DISTILL.TEACHER.WEIGHTS or teacher_cfg.MODEL.WEIGHTS
    _share_limits(cfg, teacher_cfg)
    return teacher_cfg


def _share_limits(cfg: CfgNode, teacher_cfg: CfgNode) -> None:
    """Detections beyond the student's limits count for nobody: metrics of both would not be comparable."""
    ours, theirs = architecture_class(cfg).SCORE_THRESHOLD, architecture_class(teacher_cfg).SCORE_THRESHOLD
    for key in ["TEST.DETECTIONS_PER_IMAGE", *([ours] if ours and ours == theirs else [])]:
        value = get_key(cfg, key)
        if get_key(teacher_cfg, key) != value:
            logger.info(
                "The teacher is evaluated with the student's %s: %s, not %s", key, value, get_key(teacher_cfg, key)
            )
            teacher_cfg.merge_from_list([key, value])
    if ours and theirs and ours != theirs and get_key(cfg, ours) != get_key(teacher_cfg, theirs):
        # other heads have other scores, so one number would not be one limit
        logger.info(
            "Student and teacher drop detections below other scores: %s %s, and %s %s",
            ours,
            get_key(cfg, ours),
            theirs,
            get_key(teacher_cfg, theirs),
        )


def load_teacher(teacher_cfg: CfgNode) -> tuple[nn.Module, dict[str, Classes]]:
    """Returns the teacher with its weights, all of them, and its classes.

    Raises:
        TeacherError: the file is missing or broken, or keys are missing, unexpected or of another shape.
        ArchitectureError: its configuration names an architecture that is not there.
    """
    path = teacher_cfg.MODEL.WEIGHTS
    if not path:
        return _load_from_library(teacher_cfg), classes_of(teacher_cfg)
    try:
        found = PathManager.isfile(PathManager.get_local_path(path.split("?")[0]))
    except Exception as error:
        raise TeacherError(f"DISTILL.TEACHER.WEIGHTS (--teacher-weights) is {path!r}: {error}") from error
    if not found:
        raise TeacherError(f"DISTILL.TEACHER.WEIGHTS (--teacher-weights) is {path!r}: there is no such file.")
    warn_if_unknown(teacher_cfg, "Teacher")
    model = build_network(teacher_cfg, "DISTILL.TEACHER.CONFIG_FILE (--teacher-config)")
    saved = load_strictly(model, path, "teacher", "DISTILL.TEACHER.CONFIG_FILE and DISTILL.TEACHER.WEIGHTS")
    return model, classes_of(teacher_cfg, saved.get("class_names"))


def _load_from_library(teacher_cfg: CfgNode) -> nn.Module:
    """The teacher as a whole network of timm or torchvision, with that library's weights.

    Raises:
        TeacherError: it is none, has no weights, or these leave a part of it without.
    """
    model = build_network(teacher_cfg, "DISTILL.TEACHER.CONFIG_FILE (--teacher-config)")
    filled = load_pretrained_network(teacher_cfg, model)
    left = [name for name in model.state_dict() if name not in filled]
    if not filled:
        raise TeacherError(
            "The teacher has no weights: set DISTILL.TEACHER.WEIGHTS (--teacher-weights) to its checkpoint."
        )
    if left:
        raise TeacherError(
            f"The teacher's weights are those of its backbone alone: {left[0]} and {len(left) - 1} more have none. Set "
            "DISTILL.TEACHER.WEIGHTS (--teacher-weights) to a checkpoint of the whole teacher."
        )
    return model
