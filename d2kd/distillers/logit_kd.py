"""LogitKD: the teacher's soft labels, in the form that the task's classifier asks for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from d2kd.errors import ConfigError
from d2kd.settings import setting

from .base import DISTILLERS, FeatureMaps
from .divergence import binary_divergence, hard_label_cross_entropy, soft_count, softmax_divergence, spatial_divergence
from .predictions import PredictionDistiller
from .taps import AlignmentError, TapInfo, TapPair

_FORMS: Mapping[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "softmax": softmax_divergence,
    "sigmoid": binary_divergence,
    "spatial": spatial_divergence,
    "hard": hard_label_cross_entropy,
}


@DISTILLERS.register()
class LogitKD(PredictionDistiller):
    """Divergence of the student's class probabilities from the teacher's (Hinton et al., arXiv 1503.02531).

    Forms: "softmax" over the classes of an image, region or pixel; "sigmoid", independent classes of dense detectors;
    "spatial", a distribution over positions for every class of a segmentor; "hard", the teacher's decision as a label.

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
        "hard: cross entropy to the teacher's most probable class | auto: as the head has it.",
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
            counts = [soft_count(x) for x in logits]
            objects = sum(counts[1:], start=counts[0]).clamp(min=1)
            losses.update({pair.name: losses[pair.name] / objects for _, pair in dense})
        return losses

    def level_loss(self, level: int, student: Tensor, teacher: Tensor) -> Tensor:
        tap = self.pairs[level].student
        return _FORMS[self._forms[level]](_classes(tap, student), _classes(tap, teacher), self.temperature)

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
        return form


def _classes(tap: TapInfo, logits: Tensor) -> Tensor:
    """The logits of the classes that are trained."""
    unused = tap.prediction.unused_channels if tap.prediction is not None else 0
    return logits[:, :-unused] if unused else logits
