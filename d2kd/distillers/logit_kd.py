"""LogitKD: the teacher's soft labels, in the form that the task's classifier asks for."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from d2kd.layers import AlignmentError, binary_divergence, soft_count, softmax_divergence, spatial_divergence
from detectron2.config import CfgNode

from .base import DISTILLERS, TapPair
from .predictions import PredictionDistiller

_FORMS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "softmax": softmax_divergence,
    "sigmoid": binary_divergence,
    "spatial": spatial_divergence,
}
#: The form for what a tap holds.
_FORM_OF = {
    "image logits": "softmax",
    "region logits": "softmax",
    "region sigmoid logits": "sigmoid",
    "dense logits": "sigmoid",
    "pixel logits": "spatial",
}


@DISTILLERS.register()
class LogitKD(PredictionDistiller):
    """Divergence of the student's class probabilities from the teacher's (Hinton et al., arXiv 1503.02531).

    Forms: "softmax" over the classes of an image, region or pixel; "sigmoid", independent classes of dense detectors;
    "spatial", a distribution over positions for every class of a segmentor.
    """

    CONFIG_NODE = "LOGIT_KD"
    PREDICTION = "logits"

    def __init__(
        self, *, pairs: Sequence[TapPair], weight: float, temperature: float = 1.0, form: str = "auto"
    ) -> None:
        """
        Args:
            pairs, weight: see `Distiller`.
            temperature: divides the logits; above 0.
            form: "softmax", "sigmoid" or "spatial"; "auto" by what each tap holds.

        Raises:
            AlignmentError: other classes, or strides that this form cannot bring together.
            ValueError: an argument is out of range, or "auto" where it is unknown what the taps hold.
        """
        if form not in ("auto", *_FORMS):
            raise ValueError(
                f"DISTILL.{self.CONFIG_NODE}.FORM is {form!r}; it must be one of auto, {', '.join(_FORMS)}."
            )
        if not temperature > 0:
            raise ValueError(f"DISTILL.{self.CONFIG_NODE}.TEMPERATURE is {temperature}; it must be above 0.")
        super().__init__(pairs=pairs, weight=weight)
        self._forms = [self._form_of(pair, form) for pair in pairs]
        self.temperature = float(temperature)

    @classmethod
    def from_config(cls, node: CfgNode, pairs: Sequence[TapPair]) -> dict[str, Any]:
        return {**super().from_config(node, pairs), "temperature": node.TEMPERATURE, "form": node.FORM}

    def may_resample(self, pair: TapPair) -> bool:
        """Scores of pixels mean the same at any stride; those of anchors do not."""
        return pair.holds == "pixel logits"

    def forward(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, Tensor]:
        """As in the base class.

        The sigmoid form is divided by the number of objects that the teacher sees, over all levels, as the focal loss
        is by that of the foreground: a mean over all anchors would vanish among the background.
        """
        losses = super().forward(student, teacher)
        dense = [pair for pair, form in zip(self.pairs, self._forms) if form == "sigmoid"]
        if dense:
            objects = sum(soft_count(_classes(pair, teacher[pair.teacher])) for pair in dense).clamp(min=1)
            losses.update({pair.student: losses[pair.student] / objects for pair in dense})
        return losses

    def level_loss(self, level: int, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = (_classes(self.pairs[level], x) for x in (student, teacher))
        return _FORMS[self._forms[level]](student, teacher, self.temperature)

    @classmethod
    def _form_of(cls, pair: TapPair, form: str) -> str:
        if form == "auto" and pair.holds not in _FORM_OF:
            raise ValueError(
                f"DISTILL.{cls.CONFIG_NODE}.TAPS names {pair.student!r}, and it is unknown what classifier that is: "
                f"set DISTILL.{cls.CONFIG_NODE}.FORM to {', '.join(_FORMS)}."
            )
        chosen = _FORM_OF[pair.holds] if form == "auto" else form
        if chosen == "spatial" and (pair.student_shape.is_vector or pair.teacher_shape.is_vector):
            raise AlignmentError(
                f"DISTILL.{cls.CONFIG_NODE}.FORM is spatial, but {pair.student} or {pair.teacher} gives no map "
                "(N, K, H, W)."
            )
        return chosen


def _classes(pair: TapPair, logits: Tensor) -> Tensor:
    """The logits without the background, the last column, where a sigmoid classifier of regions does not train it."""
    return logits[:, :-1] if pair.holds == "region sigmoid logits" else logits
