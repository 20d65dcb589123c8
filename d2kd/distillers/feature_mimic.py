"""FeatureMimic: plain feature imitation, the control beside the published methods."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from d2kd.errors import ConfigError
from d2kd.layers import normalize, object_weights, squared_error, standardized_error, weighted_error
from d2kd.layers.losses import center
from d2kd.layers.position_weights import weighted_standardized_error
from d2kd.settings import setting

from .base import DISTILLERS, FeatureDistiller
from .taps import TapPair


@DISTILLERS.register()
class FeatureMimic(FeatureDistiller):
    """Squared error between the (aligned) student map and the teacher map.

    Standardized and averaged it is the Pearson-correlation imitation of Cao et al., "PKD" (NeurIPS 2022, eq. 4 to 6),
    up to a factor of two; unnormalized and summed it is the imitation loss of Romero et al., "FitNets" (ICLR 2015, eq.
    3), again up to a factor of two. With FOREGROUND the positions are weighted as by the masks of Yang et al., "FGD"
    (arXiv 2111.11837, section 3.1), without its attention: objects of all sizes alike, whatever their number of cells.

    Example:
        >>> mimic = FeatureMimic(pairs=[TapPair(TapInfo("p3", 64, 8), TapInfo("p3", 256, 8))])
        >>> losses = mimic({"p3": student_map}, {"p3": teacher_map})
    """

    DEFAULTS = {"WEIGHT": 4.0}

    foreground: float = setting(
        0.0,
        "Share of all ground-truth boxes of an image in its loss, each box alike; the other positions have the rest. 0 "
        "weighs all positions alike.",
        at_least=0,
        at_most=1,
    )

    def __init__(self, *, pairs: Sequence[TapPair], **settings: Any) -> None:
        super().__init__(pairs=pairs, **settings)
        self.align = self.build_aligners()

    @property
    def uses_boxes(self) -> bool:
        """As in the base class."""
        return self.foreground > 0

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        student = self.align[level](student)
        if self.foreground:
            return self._weighted(level, student, teacher, valid)
        if self.normalize == "standardize" and valid is None:
            return standardized_error(student, teacher, self.reduction)
        student = normalize(student, self.normalize, valid)
        return squared_error(student, normalize(teacher, self.normalize, valid), self.reduction, valid)

    def _weighted(self, level: int, student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
        if self.boxes is None or len(self.boxes) != len(student):
            raise ConfigError(
                f"DISTILL.{self.NODE}.FOREGROUND is {self.foreground}, and the images have no boxes of objects: set it "
                "to 0."
            )
        size, stride = (student.shape[-2], student.shape[-1]), self.pairs[level].student.stride
        boxes = [of_image.to(student.device) for of_image in self.boxes]
        weights = object_weights(boxes, size, stride, self.foreground, valid)
        if self.normalize == "standardize" and valid is None:
            error = weighted_standardized_error(student, center(student), center(teacher), weights)
        else:
            student, teacher = (normalize(x, self.normalize, valid) for x in (student, teacher))
            error = weighted_error(student, teacher, weights)
        return error * student[0].numel() if self.reduction == "batchmean" else error
