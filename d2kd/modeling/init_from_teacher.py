"""Initializes the student's neck and heads from the teacher's, wherever names and shapes fit."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from d2kd.distillers import AlignmentError, check_same_meaning
from d2kd.errors import UserError

from .architectures import Architecture, architecture_of
from .classes import ClassMatch, class_rows, predicts_classes

logger = logging.getLogger(__name__)


class InitializationError(UserError):
    """`DISTILL.INIT_FROM_TEACHER` names what is not there."""


class InitializationReport(NamedTuple):
    """What was initialized from the teacher, by parameter or buffer name of the student."""

    copied: list[str]
    # names that both have, with the student's and the teacher's shape
    other_shape: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    # names of the student, outside its bottom-up network, that the teacher lacks
    absent: list[str]
    # of layers that predict classes, where the models have other ones or in another order: the places in the student's
    # and the teacher's outputs that stand for the same; empty where nothing does
    by_class: dict[str, tuple[list[int], list[int]]]
    # names of the teacher, outside its bottom-up network, that the student lacks
    left: Sequence[str] = ()
    # by path of a prediction layer that is copied: why equal outputs of it mean something else in the student
    other_meaning: Mapping[str, str] = MappingProxyType({})


def plan_initialization(
    student: nn.Module,
    teacher: nn.Module,
    exclude: Iterable[str] = (),
    classes: Mapping[str, ClassMatch] | None = None,
) -> InitializationReport:
    """Returns what `init_from_teacher` would copy; nothing is changed.

    Args:
        student, teacher: any two models.
        exclude: name prefixes that keep the student's own values, beside its bottom-up network.
        classes: how the student's classes are to the teacher's, by kind, where that is known: layers that predict
            classes are copied class by class, and not at all where numbers differ and names are unknown.

    Raises:
        InitializationError: a prefix of `exclude` matches nothing in the student.
    """
    ours, theirs = student.state_dict(), teacher.state_dict()
    kept = tuple(exclude)
    for prefix in kept:
        if not any(name.startswith(prefix) for name in ours):
            raise InitializationError(
                f"DISTILL.INIT_FROM_TEACHER.EXCLUDE names {prefix!r}, but nothing in the student starts so."
            )
    architecture = architecture_of(student)
    differ = {kind: match for kind, match in (classes or {}).items() if not match.same}
    class_layers = {layer.path: layer for layer in architecture.class_layers() if layer.kind in differ}
    other = architecture_of(teacher)
    left = [name for name in theirs if name not in ours and not name.startswith(f"{other.bottom_up}.")]
    report = InitializationReport(copied=[], other_shape=[], absent=[], by_class={}, left=left)
    for name in [n for n in ours if not n.startswith((f"{architecture.bottom_up}.", *kept))]:
        layer = class_layers.get(name.rpartition(".")[0])
        if name not in theirs:
            report.absent.append(name)
            continue
        shapes = tuple(ours[name].shape), tuple(theirs[name].shape)
        if layer is not None and shapes[0] and shapes[0][1:] == shapes[1][1:]:
            match = differ[layer.kind]
            if predicts_classes(layer, match, shapes[0][0], shapes[1][0]):
                report.by_class[name] = class_rows(layer, match, shapes[0][0], shapes[1][0]) or ([], [])
                continue
        if shapes[0] != shapes[1]:
            report.other_shape.append((name, *shapes))
        else:
            report.copied.append(name)
    copied = {name.rpartition(".")[0] for name in report.copied}
    meanings = _other_meanings(architecture, other).items()
    taken = {path: why for path, why in meanings if any(f"{module}.".startswith(f"{path}.") for module in copied)}
    return report._replace(other_meaning=taken)


def _other_meanings(student: Architecture, teacher: Architecture) -> dict[str, str]:
    """Of layers that both have: the first reason why the student makes something else of the same numbers."""
    theirs = {(p.tap.partition("@")[0], p.kind, p.location, p.place): p for p in teacher.meanings()}
    found: dict[str, str] = {}
    for ours in student.meanings():
        path = ours.tap.partition("@")[0]
        other = theirs.get((path, ours.kind, ours.location, ours.place))
        if other is not None and path not in found:
            try:
                check_same_meaning(path, ours, other)
            except AlignmentError as error:
                found[path] = str(error)
    return found


def why_not_the_teachers(plan: InitializationReport, modules: Iterable[str], names: Iterable[str]) -> str:
    """Why modules of a student are not the teacher's as a whole, in a sentence; "" where they are.

    Args:
        plan: what is initialized from the teacher.
        modules: name prefixes, e.g. "head".
        names: all of the student's state.
    """
    prefixes = tuple(modules)
    own = [name for name in names if name.startswith(prefixes) and name not in plan.copied]
    if own:
        return f"{own[0]} is not taken from the teacher as a whole{_reason(own[0], plan)}."
    left = [name for name in plan.left if name.startswith(prefixes)]
    if left:
        return f"The teacher has {left[0]} too, and the student no such layer."
    return next((why for path, why in plan.other_meaning.items() if path.startswith(prefixes)), "")


@torch.no_grad()
def init_from_teacher(
    student: nn.Module,
    teacher: nn.Module,
    exclude: Iterable[str] = (),
    classes: Mapping[str, ClassMatch] | None = None,
) -> InitializationReport:
    """Copies neck and heads of the teacher into the student, once; nothing stays tied.

    This is the "init_student" step of the official code of Yang et al., "Masked Generative Distillation" (2022), except
    that it reports what fitted, and tells classes apart by their names. Arguments and errors are those of
    `plan_initialization`; the student is changed in place.
    """
    report = plan_initialization(student, teacher, exclude, classes)
    ours, theirs = student.state_dict(), teacher.state_dict()
    for name in report.copied:
        ours[name].copy_(theirs[name])
    for name, (to, source) in report.by_class.items():
        if to:
            ours[name][to] = theirs[name][source].to(ours[name])
    _log(report, classes or {})
    return report


def freeze_initialized(student: nn.Module, plan: InitializationReport, modules: Sequence[str]) -> None:
    """Stops the training of modules that a student takes from its teacher, so that they stay the teacher's.

    With the whole head this is the reuse of the teacher's classifier by Chen et al. (SimKD, CVPR 2022, arXiv
    2203.14001, section 3.2): the student's features have to be such that the teacher's head understands them. Batch
    norms in them normalize by the teacher's statistics, in training too.

    Args:
        student: changed in place.
        plan: what is initialized from the teacher.
        modules: name prefixes, e.g. "head" or "head.cls_score".

    Raises:
        InitializationError: a prefix matches nothing, or something that is not the teacher's as a whole: tensors of
            its own, layers that it lacks, or outputs that it reads otherwise (anchors, encoding of boxes).
    """
    names = list(student.state_dict())
    for prefix in modules:
        if not any(name.startswith(prefix) for name in names):
            raise InitializationError(
                f"DISTILL.INIT_FROM_TEACHER.FREEZE names {prefix!r}, but nothing in the student starts so."
            )
        if why := why_not_the_teachers(plan, [prefix], names):
            raise InitializationError(
                f"DISTILL.INIT_FROM_TEACHER.FREEZE names {prefix!r}, which is not the teacher's and must be trained. "
                f"{why} Name modules without it, or make the student's the teacher's."
            )
    prefixes = tuple(modules)
    for name, parameter in student.named_parameters():
        if name.startswith(prefixes):
            parameter.requires_grad_(False)
    for name, module in student.named_modules():
        if name.startswith(prefixes) and isinstance(module, _BatchNorm) and module.track_running_stats:
            module.register_forward_pre_hook(_evaluate)  # not once: `train()` of any module around it would undo that


def _evaluate(module: nn.Module, _: object) -> None:
    module.eval()


def _reason(name: str, plan: InitializationReport) -> str:
    """Why a tensor of the student is not taken from the teacher, to stand behind that."""
    shapes = {other: f": it is {ours} here and {theirs} there" for other, ours, theirs in plan.other_shape}
    if name in plan.by_class:
        return ": the classes differ"
    return shapes.get(name, ": it has no such layer" if name in plan.absent else ": the student keeps its own")


def _log(report: InitializationReport, classes: Mapping[str, ClassMatch]) -> None:
    def modules(names: Iterable[str]) -> str:
        return ", ".join(sorted({name.rpartition(".")[0] for name in names})) or "none"

    logger.info("Initialized %d tensors from the teacher: %s", len(report.copied), modules(report.copied))
    for name, ours, theirs in report.other_shape:
        logger.warning(
            "Not initialized from the teacher, other shape: %s is %s in the student, %s in the teacher",
            name,
            ours,
            theirs,
        )
    for why in report.other_meaning.values():
        logger.warning("Initialized from the teacher, though what it predicts means something else here: %s", why)
    if report.by_class:
        _log_classes(report, [match for match in classes.values() if not match.same])
    if report.absent:
        logger.info("Not initialized from the teacher, which has no such layer: %s", modules(report.absent))
    if report.left:
        logger.info("The teacher has layers that the student lacks: %s", modules(report.left))
    if not report.copied and not any(places for places, _ in report.by_class.values()):
        logger.warning("Nothing of the teacher fits: the student keeps its own initialization.")


def _log_classes(report: InitializationReport, matches: Sequence[ClassMatch]) -> None:
    layers = ", ".join(sorted({name.rpartition(".")[0] for name in report.by_class}))
    for match in matches:
        shared = [i for i in match.indices or () if i is not None]
        sides = f"the student has {match.student}, the teacher {match.teacher}"
        if shared:
            logger.warning("Initialized by the names of classes, %d of them: %s, for %s.", len(shared), layers, sides)
        else:
            logger.warning(
                "Not initialized from the teacher, which has other classes: %s keep their own values, for %s. Teach "
                "them by features, or give both models the same classes.",
                layers,
                sides,
            )
