"""A teacher, its trained student and that student before the training, loaded to compare their features."""

import copy
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from d2kd.config import with_values
from d2kd.distillers import Distiller
from d2kd.errors import ConfigError, UserError
from d2kd.modeling import (
    DistilledModel,
    StrictLoadingError,
    Teacher,
    build_distilled_model,
    build_network,
    build_teacher,
    is_distillation,
    load_strictly,
)
from d2kd.modeling.checkpoint_files import InvalidCheckpointError, read_checkpoint
from d2kd.modeling.default_recipe import is_auto
from d2kd.modeling.teacher_passes import build_passes
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.file_io import PathManager

from .checkpoint import load_start

logger = logging.getLogger(__name__)

BEFORE, AFTER = "before", "after"
_KEYS = "--config-file and --weights"


@dataclass(frozen=True)
class ComparedModels:
    """What is compared.

    Attributes:
        teacher: of the configuration.
        students: by role, "before" (if wanted) and "after".
        distillers: as trained, by method; {} where the checkpoint has none.
        before: what the student before the training is, in words; "" without one.
    """

    teacher: Teacher
    students: Mapping[str, nn.Module]
    distillers: Mapping[str, Distiller]
    before: str


def load_compared_models(cfg: CfgNode, weights: str, before: str = "", with_before: bool = True) -> ComparedModels:
    """Builds and loads teacher and student, and the student as its training started or as another checkpoint has it.

    Args:
        cfg: of the student, with a teacher.
        weights: checkpoint of the trained student; where it has distillers, their aligners are loaded too.
        before: checkpoint of the same student; "" for the weights that a run of this configuration starts with.
        with_before: whether there is to be such a student.

    Raises:
        ConfigError: no teacher is configured, or MODEL.WEIGHTS is the trained student.
        UserError: a model cannot be built, or a checkpoint does not fit.
    """
    require_teacher(cfg)
    if with_before and not before and _same_file(cfg.MODEL.WEIGHTS, weights):
        raise ConfigError(
            f"MODEL.WEIGHTS {weights} is the trained student itself, and not what its training started with: give the "
            "YAML of the training, or --before, or --no-before."
        )
    saved = _entries(weights)
    methods = saved.get("methods")
    if methods and is_auto(cfg):
        cfg = with_values(cfg, {"DISTILL.METHODS": list(methods)})  # what it came to then
    trained_with = methods is not None and list(methods) == list(cfg.DISTILL.METHODS) and "distillers" in saved
    if methods and not trained_with:
        logger.warning(
            "%s was trained with DISTILL.METHODS %s, and the configuration has %s: its aligners are left out.",
            weights,
            list(methods),
            list(cfg.DISTILL.METHODS),
        )
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED)  # as a training does before it builds its model
    model = build_distilled_model(cfg) if trained_with else build_network(cfg, "--config-file")
    first = model.student if isinstance(model, DistilledModel) else model
    student = copy.deepcopy(first)
    load_strictly(student, weights, "student", _KEYS)
    distillers: Mapping[str, Distiller] = {}
    if isinstance(model, DistilledModel):
        distillers = _trained_distillers(model, saved["distillers"], weights)
        teacher = model.teacher
    else:
        teacher = build_teacher(cfg)
    words = ""
    if with_before and before:
        load_strictly(first, before, "student", "--config-file and --before")
        words = before
    elif with_before:
        words = _start(cfg, model, first, teacher, "methods" in saved and methods is None)
    students = {**({BEFORE: first} if with_before else {}), AFTER: student}
    return ComparedModels(teacher, students, distillers, words)


def require_teacher(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: no teacher is configured.
    """
    if not is_distillation(cfg):
        raise ConfigError(
            "There is no teacher to compare with: name its YAML and checkpoint (--teacher-config, --teacher-weights; "
            "DISTILL.TEACHER.CONFIG_FILE and WEIGHTS in --config-file)."
        )


def _same_file(one: str, other: str) -> bool:
    return bool(one) and os.path.realpath(one) == os.path.realpath(other)


def _entries(path: str) -> dict[str, Any]:
    """What a checkpoint holds."""
    try:
        content = read_checkpoint(PathManager.get_local_path(path))
    except (InvalidCheckpointError, OSError) as error:
        raise StrictLoadingError(f"The student's checkpoint {path} cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}


def _trained_distillers(model: DistilledModel, state: Any, weights: str) -> dict[str, Distiller]:
    try:
        model.distillers.load_state_dict(state)
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()
        raise StrictLoadingError(
            f"The distillers in {weights} do not fit those of the configuration (DISTILL.METHODS and their TAPS): "
            f"{reason[-1].strip() if reason else error}"
        ) from error
    return {name: d for name, d in model.distillers.eval().items() if isinstance(d, Distiller)}


def _start(cfg: CfgNode, model: nn.Module, student: nn.Module, teacher: Teacher, alone: bool) -> str:
    """Gives a student what its training started from."""
    if not isinstance(model, DistilledModel) and not alone:
        # an exported student, or one of other methods: it started as the configuration says
        model = DistilledModel(student, build_passes(cfg, student, teacher, {}), {})
    try:
        load_start(cfg, model)
    except UserError as error:
        raise ConfigError(
            f"What the training started with cannot be loaded: {error} (--before names another checkpoint, "
            "--no-before shows the trained student only)"
        ) from error
    drawn = cfg.SEED < 0 and not cfg.MODEL.WEIGHTS
    return "new random weights, as SEED is -1" if drawn else "the weights that its training started with"
