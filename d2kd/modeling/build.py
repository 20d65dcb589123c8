"""Builds a distilled model from a configuration: student, teacher, methods, and what the student inherits."""

import difflib
from collections.abc import Sequence

import torch

from d2kd.distillers import DISTILLERS, Distiller, TapPair
from detectron2.config import CfgNode

from .architecture import build_network
from .balance import GradientBalance
from .distilled_model import DistilledModel
from .inherit import InheritReport, inherit, plan_inheritance
from .num_classes import num_classes
from .pairing import pairs_of_methods, split_teacher_taps
from .teacher import Teacher, load_teacher, teacher_config


class MethodError(ValueError):
    """`DISTILL.METHODS` names a method that is not there or none where one is needed, or a method's key is wrong."""


def is_distillation(cfg: CfgNode) -> bool:
    """Whether the configuration names a teacher."""
    return bool(cfg.DISTILL.TEACHER.CONFIG_FILE)


def build_distilled_model(cfg: CfgNode) -> DistilledModel:
    """Student, teacher and distillers as the configuration describes them.

    The student is built first, exactly as without distillation, and what follows leaves the global random state alone:
    so a student starts from the same weights with and without a teacher.

    Raises:
        TeacherError, TapError, AlignmentError, ValueError: what does not fit, with the configuration key to change.
    """
    methods = _methods(cfg)
    student = build_network(cfg, "--config-file")
    with torch.random.fork_rng(devices=[]):
        teacher_cfg = teacher_config(cfg)
        teacher = load_teacher(teacher_cfg)
        if cfg.DISTILL.INHERIT.ENABLED:  # whatever cannot be inherited must be known before a run begins
            plan_inheritance(student, teacher, cfg.DISTILL.INHERIT.EXCLUDE, _class_counts(cfg, teacher_cfg))
        _check_classes(cfg, teacher_cfg, methods)
        pairs = pairs_of_methods(cfg, methods, student, teacher)
        distillers = {name: _distiller(cfg, name, pairs[name]).to(cfg.MODEL.DEVICE) for name in methods}
        for distiller in distillers.values():
            distiller.check_teacher(teacher)
    plain, region_taps = split_teacher_taps(student, [pair for method in pairs.values() for pair in method])
    return DistilledModel(
        student,
        Teacher(
            teacher,
            plain,
            region_taps=region_taps,
            precision=cfg.DISTILL.TEACHER.PRECISION,
            swap_channels={cfg.INPUT.FORMAT, teacher_cfg.INPUT.FORMAT} == {"RGB", "BGR"},
        ),
        distillers,
        GradientBalance.from_config(cfg, methods),
    )


def inherit_from_teacher(cfg: CfgNode, model: DistilledModel) -> InheritReport | None:
    """Starts the student's neck and heads from the teacher's, where `DISTILL.INHERIT` says so; see `inherit`."""
    if not cfg.DISTILL.INHERIT.ENABLED:
        return None
    classes = _class_counts(cfg, teacher_config(cfg))
    return inherit(model.student, model.teacher.model, cfg.DISTILL.INHERIT.EXCLUDE, classes)


def _distiller(cfg: CfgNode, name: str, pairs: Sequence[TapPair]) -> Distiller:
    try:
        return DISTILLERS.get(name).build(cfg, pairs)
    except ValueError as error:
        if type(error) is not ValueError:  # the others are told from each other
            raise
        raise MethodError(f"{name}: {error}") from error


def _class_counts(cfg: CfgNode, teacher_cfg: CfgNode) -> tuple[int, int] | None:
    counts = [num_classes(cfg), num_classes(teacher_cfg)]
    return None if None in counts else (counts[0][1], counts[1][1])


def _methods(cfg: CfgNode) -> list[str]:
    known = sorted(name for name, _ in DISTILLERS)
    if not cfg.DISTILL.METHODS and not cfg.DISTILL.INHERIT.ENABLED:
        raise MethodError(
            f"A teacher is configured, but nothing uses it: name one or more of {', '.join(known)} in DISTILL.METHODS, "
            "or set DISTILL.INHERIT.ENABLED True."
        )
    for name in cfg.DISTILL.METHODS:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2, cutoff=0.4)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise MethodError(f"DISTILL.METHODS (--method) names {name!r}, which is none of {', '.join(known)}.{hint}")
    return list(dict.fromkeys(cfg.DISTILL.METHODS))


def _check_classes(cfg: CfgNode, teacher_cfg: CfgNode, methods: Sequence[str]) -> None:
    ours, theirs = num_classes(cfg), num_classes(teacher_cfg)
    for method in methods:
        logits = DISTILLERS.get(method).PREDICTION == "logits"
        if logits and ours is not None and theirs is not None and ours[1] != theirs[1]:
            raise MethodError(
                f"{method} compares class scores: the student has {ours[1]} classes ({ours[0]}), the teacher "
                f"{theirs[1]} ({theirs[0]} of DISTILL.TEACHER.CONFIG_FILE). Give both the same classes, or take "
                f"{method} out of DISTILL.METHODS."
            )
