"""HeadRegression: the student's box deltas follow the teacher's, as in the recipes of arXiv 2205.14589."""

import torch.nn.functional as F
from torch import Tensor

from d2kd.layers import upcast_half
from d2kd.settings import setting

from .base import DISTILLERS
from .predictions import PredictionDistiller


@DISTILLERS.register()
class HeadRegression(PredictionDistiller):
    """Smooth L1 (or L1) between box deltas, over all anchors or sampled regions alike, background included.

    Most of these boxes are of no object. `CrossKD` weighs each by the teacher's confidence.

    Example:
        >>> tap = TapInfo("head.bbox_pred@0", channels=36, stride=8)
        >>> losses = HeadRegression(pairs=[TapPair(tap, tap)])({tap.name: student_map}, {tap.name: teacher_map})
    """

    PREDICTION = "box_deltas"

    beta: float = setting(
        1.0, "Where smooth L1 turns from quadratic to linear; 0 is plain L1.", at_least=0, at_most=1000
    )

    def level_loss(self, level: int, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the mean over all elements; 0, and connected to the student, where there are none."""
        total = F.smooth_l1_loss(upcast_half(student), upcast_half(teacher), beta=self.beta, reduction="sum")
        return total / max(1, student.numel())
