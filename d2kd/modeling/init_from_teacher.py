"""Initializes the student's neck and heads from the teacher's, wherever names and shapes fit."""

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from d2kd.errors import UserError

from .architectures import architecture_of

logger = logging.getLogger(__name__)


class InitializationError(UserError):
    """A head that cannot be initialized from the teacher because it predicts other classes."""


class InitializationReport(NamedTuple):
    """What was initialized from the teacher, by parameter or buffer name of the student."""

    copied: list[str]
    # names that both have, with the student's and the teacher's shape
    other_shape: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    # names of the student, outside its bottom-up network, that the teacher lacks
    absent: list[str]


def plan_initialization(
    student: nn.Module,
    teacher: nn.Module,
    exclude: Iterable[str] = (),
    classes: tuple[int, int] | None = None,
) -> InitializationReport:
    """Returns what `init_from_teacher` would copy; nothing is changed.

    Args:
        student, teacher: any two models.
        exclude: name prefixes that keep the student's own values, beside its bottom-up network.
        classes: numbers of classes of student and teacher, where they are known.

    Raises:
        InitializationError: the numbers of classes differ and a prediction layer would be shared, or a prefix of
            `exclude` matches nothing in the student.
    """
    ours, theirs = student.state_dict(), teacher.state_dict()
    kept = tuple(exclude)
    for prefix in kept:
        if not any(name.startswith(prefix) for name in ours):
            raise InitializationError(
                f"DISTILL.INIT_FROM_TEACHER.EXCLUDE names {prefix!r}, but nothing in the student starts so."
            )
    report = InitializationReport(copied=[], other_shape=[], absent=[])
    for name in [n for n in ours if not n.startswith((f"{architecture_of(student).bottom_up}.", *kept))]:
        if name not in theirs:
            report.absent.append(name)
        elif ours[name].shape != theirs[name].shape:
            report.other_shape.append((name, tuple(ours[name].shape), tuple(theirs[name].shape)))
        else:
            report.copied.append(name)
    if classes is not None and classes[0] != classes[1]:
        predictors = [name for name, a, b in report.other_shape if _counts_classes(a[0], b[0], classes)]
        if predictors:
            raise InitializationError(_classes_differ(predictors, classes))
    return report


@torch.no_grad()
def init_from_teacher(
    student: nn.Module,
    teacher: nn.Module,
    exclude: Iterable[str] = (),
    classes: tuple[int, int] | None = None,
) -> InitializationReport:
    """Copies neck and heads of the teacher into the student, once; nothing stays tied or frozen.

    This is the "init_student" step of the official code of Yang et al., "Masked Generative Distillation" (2022), except
    that it reports what fitted. Arguments and errors are those of `plan_initialization`; the student is changed in
    place.
    """
    report = plan_initialization(student, teacher, exclude, classes)
    ours, theirs = student.state_dict(), teacher.state_dict()
    for name in report.copied:
        ours[name].copy_(theirs[name])
    _log(report)
    return report


def _counts_classes(ours: int, theirs: int, classes: tuple[int, int]) -> bool:
    """Whether two numbers of channels are to each other as the numbers of classes, with or without a background."""
    return any(ours * (classes[1] + extra) == theirs * (classes[0] + extra) for extra in (0, 1))


def _classes_differ(predictors: Sequence[str], classes: tuple[int, int]) -> str:
    layers = sorted({name.rpartition(".")[0] for name in predictors})
    return (
        f"The student has {classes[0]} classes, the teacher {classes[1]}: {', '.join(layers)} cannot be initialized "
        f"from it. Add them to DISTILL.INIT_FROM_TEACHER.EXCLUDE ({layers!r}), or give both models the same classes."
    )


def _log(report: InitializationReport) -> None:
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
    if report.absent:
        logger.info("Not initialized from the teacher, which has no such layer: %s", modules(report.absent))
    if not report.copied:
        logger.warning("Nothing of the teacher fits: the student keeps its own initialization.")
