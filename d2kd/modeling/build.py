"""Builds a distilled model from a configuration: student, teacher, methods, and the student's initialization."""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from d2kd.config import check_values, with_values
from d2kd.distillers import DISTILLERS, Distiller, TapPair, weight_schedules
from d2kd.errors import ConfigError, UserError
from detectron2.config import CfgNode

from .architectures import architecture_class, architecture_of, build_network, warn_if_unknown
from .backbone import WholeNetwork
from .balance import GradientBalance
from .classes import ClassMatch, classes_of, in_students_order, log_unknown, match_classes, predicts_classes
from .default_recipe import choose_recipe, is_auto
from .distilled_model import DistilledModel
from .init_from_teacher import (
    InitializationError,
    InitializationReport,
    freeze_initialized,
    init_from_teacher,
    plan_initialization,
)
from .taps import pairs_of_methods, with_rests
from .teacher import Teacher, TeacherError, load_teacher, teacher_config
from .teacher_passes import build_passes

logger = logging.getLogger(__name__)


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
    check_values(cfg)  # also of a configuration that no file was read for
    methods = [] if is_auto(cfg) else _methods(cfg)
    warn_if_unknown(cfg, "Student")
    student = build_network(cfg, "--config-file")
    with torch.random.fork_rng(devices=[]):
        teacher = build_teacher(cfg)
        matches = match_classes(classes_of(cfg), teacher.classes)
        log_unknown(matches)
        recipe = choose_recipe(cfg, student, teacher, matches)
        if recipe:
            cfg = with_values(cfg, recipe)
            methods = _methods(cfg)
        taken = _prepare_initialization(cfg, student, teacher, matches)
        pairs = pairs_of_methods(cfg, methods, student, teacher.model)
        for name, compared in pairs.items():
            names = [pair.name if pair.name == pair.teacher.name else str(pair) for pair in compared]
            logger.info("%s at %s", name, ", ".join(names))
        pairs = {name: _matched(name, pairs[name], student, matches) for name in methods}
        pairs |= {name: with_rests(cfg, name, pairs[name], student, teacher) for name in methods}
        _check_gradients(cfg, pairs)
        counted = _in_compared_iterations(cfg)
        distillers = {name: _distiller(counted, name, pairs[name]).to(cfg.MODEL.DEVICE) for name in methods}
        _check_predictors(cfg, student, distillers.values(), taken)
        for distiller in distillers.values():
            distiller.check_teacher(teacher.model)
    passes = build_passes(cfg, student, teacher, pairs)
    schedules = weight_schedules(cfg, {name: DISTILLERS.get(name).NODE for name in methods})
    for name, schedule in schedules.items():
        if not schedule.always_one:
            logger.info("The weight of %s %s.", name, schedule)
    return DistilledModel(
        student,
        passes,
        distillers,
        GradientBalance.from_config(cfg, methods),
        cfg.DISTILL.TASK_WEIGHT,
        cfg.DISTILL.TEACHER.EVERY,
        schedules,
        recipe,
        taken,
    )


def build_teacher(cfg: CfgNode) -> Teacher:
    """Returns the teacher of a student's configuration, with its weights, ready for the student's images.

    Raises:
        UserError: it cannot be built or loaded, or does not take these images.
    """
    teacher_cfg = teacher_config(cfg)
    formats = {cfg.INPUT.FORMAT, teacher_cfg.INPUT.FORMAT}
    if len(formats) > 1 and formats != {"RGB", "BGR"}:
        raise TeacherError(
            f"INPUT.FORMAT is {cfg.INPUT.FORMAT}, and {teacher_cfg.INPUT.FORMAT} in {cfg.DISTILL.TEACHER.CONFIG_FILE}: "
            "the teacher gets the student's images, of which only RGB and BGR are exchanged. Give both one format."
        )
    teacher = Teacher(
        *load_teacher(teacher_cfg),
        precision=cfg.DISTILL.TEACHER.PRECISION,
        swap_channels=len(formats) > 1,
    )
    _check_image_size(cfg, teacher.model)
    return teacher


def initialize_student(cfg: CfgNode, model: DistilledModel) -> InitializationReport | None:
    """Initializes the student's neck and heads from the teacher's, where `DISTILL.INIT_FROM_TEACHER` says so."""
    if not cfg.DISTILL.INIT_FROM_TEACHER.ENABLED:
        return None
    matches = match_classes(classes_of(cfg), model.teacher.classes)
    return init_from_teacher(model.student, model.teacher.model, cfg.DISTILL.INIT_FROM_TEACHER.EXCLUDE, matches)


def plan_student(cfg: CfgNode, model: DistilledModel) -> InitializationReport:
    """Returns what `initialize_student` takes from the teacher, or would take; nothing is changed."""
    matches = match_classes(classes_of(cfg), model.teacher.classes)
    return plan_initialization(model.student, model.teacher.model, cfg.DISTILL.INIT_FROM_TEACHER.EXCLUDE, matches)


def _prepare_initialization(
    cfg: CfgNode, student: nn.Module, teacher: Teacher, matches: Mapping[str, ClassMatch]
) -> list[str]:
    """Freezes what `DISTILL.INIT_FROM_TEACHER.FREEZE` names; returns the names of all that is taken from the teacher.

    What does not fit raises here, before a run begins.
    """
    node = cfg.DISTILL.INIT_FROM_TEACHER
    if node.ENABLED:
        plan = plan_initialization(student, teacher.model, node.EXCLUDE, matches)
        freeze_initialized(student, plan, node.FREEZE)
        return plan.copied
    if node.FREEZE:
        raise InitializationError(
            f"DISTILL.INIT_FROM_TEACHER.FREEZE is {list(node.FREEZE)}, and ENABLED there is False: nothing is taken "
            "from the teacher that could stay as it is. Set ENABLED to True, or FREEZE to []."
        )
    if node.LR_FACTOR != 1:
        logger.warning("DISTILL.INIT_FROM_TEACHER.LR_FACTOR has no effect: ENABLED there is False.")
    return []


def _check_image_size(cfg: CfgNode, teacher: nn.Module) -> None:
    backbone: Any = getattr(teacher, "backbone", None)
    if isinstance(backbone, WholeNetwork):
        try:
            backbone.require_logits(cfg.INPUT.CLASSIFICATION.SIZE)
        except ConfigError as error:
            raise TeacherError(f"The teacher gets the student's images: {error}") from error


def _in_compared_iterations(cfg: CfgNode) -> CfgNode:
    """The configuration as methods count: they see every n-th iteration only (DISTILL.TEACHER.EVERY)."""
    every = cfg.DISTILL.TEACHER.EVERY
    if every == 1:
        return cfg
    counted = cfg.clone()
    counted.defrost()
    for _, method in DISTILLERS:
        node = counted.DISTILL.get(method.NODE, {})
        for declared in method.SETTINGS.values():
            if declared.iterations and declared.key in node:
                node[declared.key] = declared.scaled(node[declared.key], 1 / every)
    return counted


def _distiller(cfg: CfgNode, name: str, pairs: Sequence[TapPair]) -> Distiller:
    try:
        return DISTILLERS.get(name).build(cfg, pairs)
    except UserError:
        raise
    except ValueError as error:  # of a method that raises plain ones
        raise MethodError(f"{name}: {error}") from error


def _methods(cfg: CfgNode) -> list[str]:
    methods = list(cfg.DISTILL.METHODS)
    if not methods and not cfg.DISTILL.INIT_FROM_TEACHER.ENABLED:
        raise MethodError(
            "A teacher is configured, but nothing uses it: name one or more of "
            f"{', '.join(sorted(name for name, _ in DISTILLERS))} in DISTILL.METHODS, or set "
            "DISTILL.INIT_FROM_TEACHER.ENABLED True."
        )
    if not methods and cfg.DISTILL.TASK_WEIGHT != 1:
        logger.warning("DISTILL.TASK_WEIGHT has no effect: DISTILL.METHODS is [], and there is the task alone.")
    for name in methods:
        if DISTILLERS.get(name).NODE not in cfg.DISTILL:
            raise MethodError(f"{name} was registered after the configuration was read: import its file before that.")
        mixed = [key for key in ("MIXUP", "CUTMIX") if cfg.INPUT.CLASSIFICATION[key] > 0]
        if DISTILLERS.get(name).HARD_LABELS and architecture_class(cfg).CLASSIFIES_IMAGES and mixed:
            raise MethodError(
                f"{name} needs images with one label each, and INPUT.CLASSIFICATION.{mixed[0]} mixes them: set "
                f"{' and '.join(mixed)} to 0, or take {name} out of DISTILL.METHODS."
            )
    return methods


def _matched(
    method: str, pairs: Sequence[TapPair], student: nn.Module, matches: Mapping[str, ClassMatch]
) -> list[TapPair]:
    """The pairs of a method, with the teacher's predictions in the order of the student's classes.

    Raises:
        MethodError: it compares predictions for classes, and the teacher has not all of the student's; or the
            background of a softmax would be that of other classes.
    """
    if not DISTILLERS.get(method).PREDICTION:
        return list(pairs)
    layers = {layer.path: layer for layer in architecture_of(student).class_layers()}
    matched = []
    for pair in pairs:
        layer = next(
            (layer for path, layer in layers.items() if path.endswith(pair.student.name.partition("@")[0])), None
        )
        match = None if layer is None else matches.get(layer.kind)
        if layer is None or match is None or match.same:
            matched.append(pair)
            continue
        if not predicts_classes(layer, match, pair.student.channels, pair.teacher.channels):
            matched.append(pair)  # class-agnostic, or an error that the method tells
            continue
        fewer = match.student.number < match.teacher.number
        softmax = pair.student.prediction is not None and pair.student.prediction.activation == "softmax"
        if match.known is None or (fewer and softmax):
            raise MethodError(
                f"{method} looks at class scores: the student has {match.student} ({match.student.key}), the teacher "
                f"{match.teacher} ({match.teacher.key} of DISTILL.TEACHER.CONFIG_FILE). Give both the same classes, or "
                f"take {method} out of DISTILL.METHODS."
            )
        matched.append(in_students_order(pair, layer, match))
    if any(pair.teacher.order is not None for pair in matched):
        logger.info("%s: the teacher's classes are matched to the student's by their names", method)
    return matched


def _check_gradients(cfg: CfgNode, pairs: Mapping[str, Sequence[TapPair]]) -> None:
    """What is compared must be able to teach the student something.

    Raises:
        MethodError: all taps of a method lie before every trained parameter.
    """
    for method, compared in pairs.items():
        dead = [pair.name for pair in compared if not pair.student.trainable]
        if not dead:
            continue
        text = (
            f"{method} compares {', '.join(dead)}, and no parameter up to there is trained (MODEL.BACKBONE.FREEZE_AT "
            f"is {cfg.MODEL.BACKBONE.FREEZE_AT}): it can teach the student nothing there."
        )
        key = f"DISTILL.{DISTILLERS.get(method).NODE}.TAPS"
        if len(dead) == len(compared):
            raise MethodError(f"{text} Name other features in {key}, or set MODEL.BACKBONE.FREEZE_AT lower.")
        logger.warning("%s Take it out of %s.", text, key)


def _check_predictors(
    cfg: CfgNode, student: nn.Module, distillers: Collection[Distiller], taken: Sequence[str]
) -> None:
    """Without the task's losses something else must make the layers that predict.

    Raises:
        MethodError: they stay as they were drawn at random.
    """
    if cfg.DISTILL.TASK_WEIGHT > 0 or not distillers:
        return
    taught = [pair for d in distillers for level, pair in enumerate(d.pairs) if d.teaches(level)]
    compared = {pair.student.name.partition("@")[0] for pair in taught}
    architecture = architecture_of(student)
    layers = {p.tap.partition("@")[0] for p in (*architecture.predictions(), *architecture.evidence())}
    layers |= {layer.path for layer in architecture.class_layers()}
    trained = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    still = [name for name in trained if name.rpartition(".")[0].endswith(tuple(layers - compared))]
    random = [name for name in still if name not in taken]
    if not still:
        return
    text = f"DISTILL.TASK_WEIGHT is 0, and no method trains {', '.join(random or still)}: "
    if not random:
        text += (
            "the optimizer's weight decay alone changes them. DISTILL.INIT_FROM_TEACHER.FREEZE keeps them as they are."
        )
    elif cfg.MODEL.WEIGHTS or isinstance(getattr(student, "backbone", None), WholeNetwork):
        text += "they stay as the weights of the start have them, and random where those have none."
    else:
        raise MethodError(
            f"{text}the student would predict with random weights. Set TASK_WEIGHT above 0, or take these layers from "
            "the teacher (DISTILL.INIT_FROM_TEACHER, the same classes and widths)."
        )
    logger.warning("%s", text)
