"""LogitKD: the teacher's soft labels, in the form that the task's classifier asks for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from d2kd.errors import ConfigError
from d2kd.layers import mean_over_processes
from d2kd.settings import setting

from .base import DISTILLERS, FeatureMaps
from .divergence import (
    binary_divergence,
    hard_label_cross_entropy,
    pooled_divergence,
    soft_count,
    softmax_divergence,
    spatial_divergence,
)
from .predictions import PredictionDistiller
from .taps import AlignmentError, TapInfo, TapPair

_FORMS: Mapping[str, Callable[..., Tensor]] = {
    "softmax": softmax_divergence,
    "sigmoid": binary_divergence,
    "spatial": spatial_divergence,
    "hard": hard_label_cross_entropy,
    "patch": pooled_divergence,
}


@DISTILLERS.register()
class LogitKD(PredictionDistiller):
    """Divergence of the student's class probabilities from the teacher's (Hinton et al., arXiv 1503.02531).

    Forms: "softmax" over the classes of an image, region or pixel; "sigmoid", independent classes of dense detectors;
    "spatial", a distribution over positions for every class of a segmentor; "patch", the classes of a teacher's coarse
    pixel, such as a patch of a vision transformer, as the mean over the student's pixels there; "hard", the teacher's
    decision as a label.

    Example:
        >>> tap = TapInfo("linear", channels=10, stride=0)
        >>> kd = LogitKD(pairs=[TapPair(tap, tap)], temperature=4.0, form="softmax")
        >>> losses = kd({"linear": student_logits}, {"linear": teacher_logits})
    """

    PREDICTION = "class_logits"

    temperature: float = setting(
        1.0, "Divides the logits; the loss is multiplied by its square.", above=0, at_most=1000
    )
    form: str = setting(
        "auto",
        "softmax: over the classes | sigmoid: independent classes | spatial: over the positions, for each class | "
        "patch: over the classes, of the mean over the student's pixels in each pixel of the teacher's map | hard: "
        "cross entropy to the teacher's most probable class | auto: as the head has it.",
        choices=("auto", *_FORMS),
    )

    def __init__(self, *, pairs: Sequence[TapPair], **settings: Any) -> None:
        """
        Raises:
            AlignmentError: other classes, or strides that this form cannot bring together.
            ConfigError: FORM is "auto" where it is unknown what the taps predict.
        """
        super().__init__(pairs=pairs, **settings)
        self._forms = [self._form_of(pair) for pair in pairs]

    def may_resample(self, pair: TapPair) -> bool:
        """Returns whether these are scores of pixels, which mean the same at any stride; those of anchors do not."""
        return pair.student.prediction is not None and pair.student.prediction.location == "pixel"

    def forward(
        self, student: FeatureMaps, teacher: FeatureMaps, valid: FeatureMaps | None = None
    ) -> dict[str, Tensor]:
        """As in the base class.

        The sigmoid form is divided by the number of objects that the teacher sees, over all levels, as the focal loss
        is by that of the foreground: a mean over all anchors would vanish among the background.
        """
        losses = super().forward(student, teacher, valid)
        dense = [(level, pair) for level, pair in enumerate(self.pairs) if self._forms[level] == "sigmoid"]
        if dense:
            logits = [_classes(pair.student, self.teacher_feature(level, teacher)) for level, pair in dense]
            known = [(valid or {}).get(pair.teacher.name) for _, pair in dense]
            counts = [soft_count(x if k is None else x.where(k[:, None], -1e4)) for x, k in zip(logits, known)]
            objects = mean_over_processes(sum(counts[1:], start=counts[0])).clamp(min=1)
            losses.update({pair.name: losses[pair.name] / objects for _, pair in dense})
        return losses

    def aligned(self, level: int, student: FeatureMaps, teacher: FeatureMaps) -> tuple[Tensor, Tensor]:
        """As in the base class; the form "patch" brings the student's probabilities to the teacher's grid later."""
        if self._forms[level] != "patch":
            return super().aligned(level, student, teacher)
        ours = student[self.pairs[level].student.name]
        return ours.detach() if self.weight == 0 else ours, self.teacher_feature(level, teacher).detach()

    def align_valid(self, level: int, valid: Tensor, size: tuple[int, int]) -> Tensor:
        """As in the base class."""
        return valid if self._forms[level] == "patch" else super().align_valid(level, valid, size)

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        tap, form = self.pairs[level].student, self._forms[level]
        options = {"cells": round(self._stride_ratios[level] or 1)} if form == "patch" else {}
        loss = _FORMS[form]
        return loss(_classes(tap, student), _classes(tap, teacher), self.temperature, valid=valid, **options)

    def _form_of(self, pair: TapPair) -> str:
        prediction = pair.student.prediction
        if self.form != "auto":
            form = self.form
        elif prediction is None or not prediction.activation:
            raise ConfigError(
                f"DISTILL.{self.NODE}.TAPS names {pair.name!r}, and it is unknown what classifier that is: set "
                f"DISTILL.{self.NODE}.FORM to {', '.join(_FORMS)}."
            )
        else:
            form = "spatial" if prediction.location == "pixel" else prediction.activation
        if form == "spatial" and (pair.student.is_vector or pair.teacher.is_vector):
            raise AlignmentError(f"DISTILL.{self.NODE}.FORM is spatial, but {pair} gives no map (N, K, H, W).")
        if form == "patch":
            self._check_patches(pair)
        return form

    def _check_patches(self, pair: TapPair) -> None:
        ours, theirs = pair.student.stride, pair.teacher.stride
        if not ours or theirs < ours or theirs % ours:
            raise AlignmentError(
                f"DISTILL.{self.NODE}.FORM is patch, which needs maps, the teacher's with a multiple of the student's "
                f"stride; {pair} have the strides {ours:g} and {theirs:g}."
            )


def _classes(tap: TapInfo, logits: Tensor) -> Tensor:
    """The logits of the classes that are trained."""
    unused = tap.prediction.unused_channels if tap.prediction is not None else 0
    return logits[:, :-unused] if unused else logits
