"""FeatureMimic: plain feature imitation, the control beside the published methods."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from d2kd.layers import normalize, squared_error, standardized_error

from .base import DISTILLERS, FeatureDistiller
from .taps import TapPair


@DISTILLERS.register()
class FeatureMimic(FeatureDistiller):
    """Squared error between the (aligned) student map and the teacher map.

    Standardized and averaged it is the Pearson-correlation imitation of Cao et al., "PKD" (NeurIPS 2022, eq. 4 to 6),
    up to a factor of two; unnormalized and summed it is the imitation loss of Romero et al., "FitNets" (ICLR 2015, eq.
    3), again up to a factor of two.

    Example:
        >>> mimic = FeatureMimic(pairs=[TapPair(TapInfo("p3", 64, 8), TapInfo("p3", 256, 8))])
        >>> losses = mimic({"p3": student_map}, {"p3": teacher_map})
    """

    DEFAULTS = {"WEIGHT": 4.0}

    def __init__(self, *, pairs: Sequence[TapPair], **settings: Any) -> None:
        super().__init__(pairs=pairs, **settings)
        self.align = self.build_aligners()

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        student = self.align[level](student)
        if self.normalize == "standardize" and valid is None:
            return standardized_error(student, teacher, self.reduction)
        student = normalize(student, self.normalize, valid)
        return squared_error(student, normalize(teacher, self.normalize, valid), self.reduction, valid)
