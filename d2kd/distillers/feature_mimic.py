"""FeatureMimic: plain feature imitation, the control beside the published methods."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from d2kd.layers import check_reduction, normalize, squared_error
from d2kd.layers.normalize import check_mode
from detectron2.config import CfgNode

from .base import DISTILLERS, Distiller, TapPair


@DISTILLERS.register()
class FeatureMimic(Distiller):
    """Squared error between the (aligned) student map and the teacher map.

    Standardised and averaged it is the Pearson-correlation imitation of Cao et al., "PKD" (NeurIPS 2022, eq. 4 to 6),
    up to a factor of two; unnormalised and summed it is the imitation loss of Romero et al., "FitNets" (ICLR 2015, eq.
    3), again up to a factor of two.
    """

    CONFIG_NODE = "FEATURE_MIMIC"

    def __init__(self, *, pairs: Sequence[TapPair], weight: float, normalize: str, reduction: str) -> None:
        """
        Args:
            pairs, weight: see `Distiller`.
            normalize: "none" or "standardize" (both maps, channel by channel).
            reduction: "mean" over all elements, or "paper": sum over channels and positions, mean over images.
        """
        super().__init__(pairs=pairs, weight=weight)
        check_mode(normalize)
        check_reduction(reduction)
        self.normalize = normalize
        self.reduction = reduction
        self.align = self.build_aligners()

    @classmethod
    def from_config(cls, node: CfgNode, pairs: Sequence[TapPair]) -> dict[str, Any]:
        return {**super().from_config(node, pairs), "normalize": node.NORMALIZE, "reduction": node.REDUCTION}

    def level_loss(self, level: int, student: Tensor, teacher: Tensor) -> Tensor:
        student = normalize(self.align[level](student), self.normalize)
        return squared_error(student, normalize(teacher, self.normalize), self.reduction)
