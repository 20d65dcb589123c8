"""Builds a distilled model from a configuration: student, teacher, methods, and the student's initialization."""

from collections.abc import Sequence

import torch

from d2kd.distillers import DISTILLERS, Distiller, TapPair
from d2kd.errors import UserError, did_you_mean
from detectron2.config import CfgNode

from .architectures import build_network, num_classes, warn_if_unknown
from .balance import GradientBalance
from .distilled_model import DistilledModel
from .init_from_teacher import InitializationReport, init_from_teacher, plan_initialization
from .taps import pairs_of_methods
from .teacher import Teacher, load_teacher, teacher_config
from .teacher_passes import build_passes


class MethodError(UserError):
    """`DISTILL.METHODS` names a method that is not there, none where one is needed, or one that does not fit."""


def is_distillation(cfg: CfgNode) -> bool:
    """Returns whether the configuration names a teacher."""
    return bool(cfg.DISTILL.TEACHER.CONFIG_FILE)


def build_distilled_model(cfg: CfgNode) -> DistilledModel:
    """Returns student, teacher and distillers as the configuration describes them.

    The student is built first, exactly as without distillation, and what follows leaves the global random state alone:
    so a student starts from the same weights with and without a teacher.

    Raises:
        UserError: what does not fit, with the configuration key to change.
    """
    methods = _methods(cfg)
    warn_if_unknown(cfg, "Student")
    student = build_network(cfg, "--config-file")
    with torch.random.fork_rng(devices=[]):
        teacher_cfg = teacher_config(cfg)
        teacher = Teacher(
            load_teacher(teacher_cfg),
            precision=cfg.DISTILL.TEACHER.PRECISION,
            swap_channels={cfg.INPUT.FORMAT, teacher_cfg.INPUT.FORMAT} == {"RGB", "BGR"},
        )
        if cfg.DISTILL.INIT_FROM_TEACHER.ENABLED:  # what does not fit must be known before a run begins
            exclude = cfg.DISTILL.INIT_FROM_TEACHER.EXCLUDE
            plan_initialization(student, teacher.model, exclude, _class_counts(cfg, teacher_cfg))
        _check_classes(cfg, teacher_cfg, methods)
        pairs = pairs_of_methods(cfg, methods, student, teacher.model)
        distillers = {name: _distiller(cfg, name, pairs[name]).to(cfg.MODEL.DEVICE) for name in methods}
        for distiller in distillers.values():
            distiller.check_teacher(teacher.model)
    passes = build_passes(cfg, student, teacher, pairs)
    return DistilledModel(student, passes, distillers, GradientBalance.from_config(cfg, methods))


def initialize_student(cfg: CfgNode, model: DistilledModel) -> InitializationReport | None:
    """Initializes the student's neck and heads from the teacher's, where `DISTILL.INIT_FROM_TEACHER` says so."""
    if not cfg.DISTILL.INIT_FROM_TEACHER.ENABLED:
        return None
    classes = _class_counts(cfg, teacher_config(cfg))
    return init_from_teacher(model.student, model.teacher.model, cfg.DISTILL.INIT_FROM_TEACHER.EXCLUDE, classes)


def _distiller(cfg: CfgNode, name: str, pairs: Sequence[TapPair]) -> Distiller:
    try:
        return DISTILLERS.get(name).build(cfg, pairs)
    except UserError:
        raise
    except ValueError as error:  # of a method that raises plain ones
        raise MethodError(f"{name}: {error}") from error


def _class_counts(cfg: CfgNode, teacher_cfg: CfgNode) -> tuple[int, int] | None:
    ours, theirs = num_classes(cfg), num_classes(teacher_cfg)
    return None if ours is None or theirs is None else (ours[1], theirs[1])


def _methods(cfg: CfgNode) -> list[str]:
    known = sorted(name for name, _ in DISTILLERS)
    if not isinstance(cfg.DISTILL.METHODS, (list, tuple)):
        raise MethodError(f"DISTILL.METHODS (--method) is {cfg.DISTILL.METHODS!r}; it must be a list of methods.")
    if not cfg.DISTILL.METHODS and not cfg.DISTILL.INIT_FROM_TEACHER.ENABLED:
        raise MethodError(
            f"A teacher is configured, but nothing uses it: name one or more of {', '.join(known)} in DISTILL.METHODS, "
            "or set DISTILL.INIT_FROM_TEACHER.ENABLED True."
        )
    for name in cfg.DISTILL.METHODS:
        if name not in known:
            raise MethodError(
                f"DISTILL.METHODS (--method) names {name!r}, which is none of {', '.join(known)}."
                f"{did_you_mean(name, known, cutoff=0.4)} A method of your own: name its file with --import."
            )
    methods = list(dict.fromkeys(cfg.DISTILL.METHODS))
    for name in methods:
        method = DISTILLERS.get(name)
        if method.NODE not in cfg.DISTILL:
            raise MethodError(f"{name} was registered after the configuration was read: import its file before that.")
        method.check_node(cfg.DISTILL[method.NODE], f"DISTILL.{method.NODE}")
    return methods


def _check_classes(cfg: CfgNode, teacher_cfg: CfgNode, methods: Sequence[str]) -> None:
    ours, theirs = num_classes(cfg), num_classes(teacher_cfg)
    for method in methods:
        logits = DISTILLERS.get(method).PREDICTION == "class_logits"
        if logits and ours is not None and theirs is not None and ours[1] != theirs[1]:
            raise MethodError(
                f"{method} compares class scores: the student has {ours[1]} classes ({ours[0]}), the teacher "
                f"{theirs[1]} ({theirs[0]} of DISTILL.TEACHER.CONFIG_FILE). Give both the same classes, or take "
                f"{method} out of DISTILL.METHODS."
            )
