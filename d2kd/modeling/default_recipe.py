"""The default recipe: what `DISTILL.METHODS: [auto]` stands for, by what student and teacher have in common."""

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from d2kd.config import get_key, list_settings
from d2kd.distillers import AUTO, DISTILLERS
from d2kd.errors import UserError
from detectron2.config import CfgNode

from .architectures import architecture_of
from .classes import ClassMatch
from .init_from_teacher import InitializationReport, plan_initialization, why_not_the_teachers
from .taps import pairs_of_methods, with_rests
from .teacher import Teacher

logger = logging.getLogger(__name__)

_BESIDE_OWN_HEAD: dict[str, Any] = {"DISTILL.TASK_WEIGHT": 0.25}
_INHERITED: dict[str, Any] = {"DISTILL.INIT_FROM_TEACHER.LR_FACTOR": 0.3}
_BEHIND_TEACHERS_HEAD: dict[str, Any] = {"DISTILL.FEATURE_MIMIC.WEIGHT": 16.0, "DISTILL.CROSS_KD.WEIGHT": 4.0}
_CLIPPING: dict[str, Any] = {
    "SOLVER.CLIP_GRADIENTS.ENABLED": True,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 10.0,
}


def is_auto(cfg: CfgNode) -> bool:
    """Returns whether the configuration leaves the methods to d2kd."""
    return list(cfg.DISTILL.METHODS) == [AUTO]


def choose_recipe(
    cfg: CfgNode, student: nn.Module, teacher: Teacher, matches: Mapping[str, ClassMatch]
) -> dict[str, Any]:
    """Returns what the default recipe sets, by whole key; {} where `DISTILL.METHODS` names methods.

    Of what docs/accuracy.md compares, that which gained most in longer runs and fits the two networks:

    * Where the teacher's heads fit the student as a whole, with the same classes, they stay as they are (as in SimKD,
      arXiv 2203.14001), and `FeatureMimic` and `CrossKD` have four times their weights. These make gradients so large
      that they must be clipped: without, plain SGD diverged in a trial.
    * Where the heads correspond, but differ in widths, `FeatureMimic` and `CrossKD` beside a quarter of the
      task's weight.
    * Else `FeatureMimic`, which suits every pair.

    Where a head is trained, what it has from the teacher learns at three tenths of the rate: at the whole rate of a
    fresh network it forgets, at a tenth it is held back by a teacher that has not learned much.

    A key that the configuration has another value for than its default keeps that value, and so does clipping. Where
    FREEZE has one, and a part of the heads is not in it, heads count as trained.

    Args:
        cfg: of the student.
        student, teacher: as built; nothing is changed.
        matches: how the student's classes are to the teacher's.
    """
    if not is_auto(cfg):
        return {}
    plan = plan_initialization(student, teacher.model, cfg.DISTILL.INIT_FROM_TEACHER.EXCLUDE, matches)
    no_cross_kd = _why_no_cross_kd(cfg, student, teacher, matches)
    own_head = no_cross_kd or _why_own_head(cfg, student, plan)
    methods = ["FeatureMimic"] if no_cross_kd else ["FeatureMimic", "CrossKD"]
    if own_head:
        values = {} if no_cross_kd else dict(_BESIDE_OWN_HEAD)
        if cfg.DISTILL.INIT_FROM_TEACHER.ENABLED:
            values |= _INHERITED
    else:
        values = {"DISTILL.INIT_FROM_TEACHER.FREEZE": _heads(student), **_BEHIND_TEACHERS_HEAD}
        if not cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
            values |= _CLIPPING
    declared = list_settings()
    unset = {key: value for key, value in values.items() if get_key(cfg, key) == declared[key].default}
    chosen = {"DISTILL.METHODS": methods, **unset}
    words = ", ".join(f"{key.removeprefix('DISTILL.')} {value}" for key, value in chosen.items())
    logger.info("DISTILL.METHODS is auto, and comes to %s.", words)
    if no_cross_kd:
        logger.info("CrossKD is not in it: %s", no_cross_kd)
    elif own_head:
        logger.info("The head is not the teacher's, but trained: %s", own_head)
    return chosen


def _why_no_cross_kd(cfg: CfgNode, student: nn.Module, teacher: Teacher, matches: Mapping[str, ClassMatch]) -> str:
    """Why features of the student's head cannot go on through the teacher's; "" where they can."""
    if any(set(match.indices or ()) != set(range(match.teacher.number)) for match in matches.values()):
        return "the classes differ."
    try:
        pairs = pairs_of_methods(cfg, ["CrossKD"], student, teacher.model)["CrossKD"]
        DISTILLERS.get("CrossKD").build(cfg, with_rests(cfg, "CrossKD", pairs, student, teacher))
    except UserError as error:
        # what to change about it is for those who have named the method
        return f"{str(error).partition('. ')[0].rstrip('.')}."
    return ""


def _heads(student: nn.Module) -> list[str]:
    """All that has parameters and is no part of the backbone."""
    backbone = architecture_of(student).backbone
    children = [(name, child) for name, child in student.named_children() if child is not backbone]
    return [name for name, child in children if next(child.parameters(), None) is not None]


def _why_own_head(cfg: CfgNode, student: nn.Module, plan: InitializationReport) -> str:
    """Why the teacher's heads cannot be the student's; "" where they can."""
    if not cfg.DISTILL.INIT_FROM_TEACHER.ENABLED:
        return "DISTILL.INIT_FROM_TEACHER.ENABLED is False."
    heads, freeze = [f"{name}." for name in _heads(student)], list(cfg.DISTILL.INIT_FROM_TEACHER.FREEZE)
    frozen = tuple(f"{name}." for name in freeze)
    trained = [n for n, _ in student.named_parameters() if n.startswith(tuple(heads)) and not n.startswith(frozen)]
    if freeze and trained:
        return f"DISTILL.INIT_FROM_TEACHER.FREEZE is {freeze}, without {trained[0]}."
    return why_not_the_teachers(plan, heads, student.state_dict())
