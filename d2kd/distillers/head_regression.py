"""HeadRegression: the student's box deltas follow the teacher's, as in the recipes of arXiv 2205.14589."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from d2kd.layers import at_least_float32
from detectron2.config import CfgNode

from .base import DISTILLERS, TapPair
from .predictions import PredictionDistiller


@DISTILLERS.register()
class HeadRegression(PredictionDistiller):
    """Smooth L1 (or L1) between box deltas, over all anchors or sampled regions alike, background included."""

    CONFIG_NODE = "HEAD_REGRESSION"
    PREDICTION = "deltas"

    def __init__(
        self, *, pairs: Sequence[TapPair], weight: float, beta: float = 1.0, tap_weights: Sequence[float] = ()
    ) -> None:
        """
        Args:
            pairs, weight: see `Distiller`.
            beta: where smooth L1 turns from quadratic to linear; 0 is plain L1.
            tap_weights: further factors, one a pair; () is 1 for each.

        Raises:
            AlignmentError: the networks predict differently many deltas, or at other strides.
            ValueError: an argument is out of range.
        """
        super().__init__(pairs=pairs, weight=weight)
        if beta < 0:
            raise ValueError(f"DISTILL.{self.CONFIG_NODE}.BETA is {beta}; it must not be negative.")
        self.beta = float(beta)
        self.tap_weights = self.factors_of_pairs("TAP_WEIGHTS", tap_weights)

    @classmethod
    def from_config(cls, node: CfgNode, pairs: Sequence[TapPair]) -> dict[str, Any]:
        return {**super().from_config(node, pairs), "beta": node.BETA, "tap_weights": node.TAP_WEIGHTS}

    def level_loss(self, level: int, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean over all elements; 0, and connected to the student, where there are none."""
        student, teacher = at_least_float32(student), at_least_float32(teacher)
        total = F.smooth_l1_loss(student, teacher, beta=self.beta, reduction="sum")
        return self.tap_weights[level] * total / max(1, student.numel())
