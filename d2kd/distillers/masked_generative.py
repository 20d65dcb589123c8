"""MaskedGenerative: the student's masked map must generate the teacher's whole map ("MGD", 2022, arXiv 2205.01529)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from d2kd.layers import RandomMasks, check_reduction, normalize, squared_error
from d2kd.layers.masks import check_kind
from d2kd.layers.normalize import check_mode
from detectron2.config import CfgNode
from detectron2.utils import comm

from .base import DISTILLERS, Distiller, TapPair


@DISTILLERS.register()
class MaskedGenerative(Distiller):
    """|| G(align(S) * M) - T ||^2 with a random mask M and a generation block G of two 3x3 convolutions (eq. 1 to 4).

    The mask is drawn anew for every level and iteration, and comes after the aligner. All positions count, masked or
    not.
    """

    CONFIG_NODE = "MASKED_GENERATIVE"

    def __init__(
        self,
        *,
        pairs: Sequence[TapPair],
        weight: float,
        mask_ratio: float,
        mask: str = "spatial",
        normalize: str = "none",
        reduction: str = "paper",
        masks: RandomMasks | None = None,
    ) -> None:
        """
        Args:
            pairs, weight: see `Distiller`; the weight is the paper's alpha.
            mask_ratio: share of positions (or channels) that is dropped, 0 to 1; the paper's lambda.
            mask: "spatial" drops positions of all channels, "channel" drops whole channels.
            normalize: "none", or "standardize" for the teacher's map (the generated map is free to match it).
            reduction: "paper": sum over channels and positions, mean over images; "mean" over all elements.
            masks: where the masks come from; by default a sequence with seed 0.

        Raises:
            ValueError: an argument is out of range.
        """
        super().__init__(pairs=pairs, weight=weight)
        if not 0.0 <= mask_ratio <= 1.0:
            raise ValueError(f"DISTILL.{self.CONFIG_NODE}.MASK_RATIO is {mask_ratio}; it must be between 0 and 1.")
        check_kind(mask)
        check_mode(normalize)
        check_reduction(reduction)
        self.mask_ratio = mask_ratio
        self.mask = mask
        self.normalize = normalize
        self.reduction = reduction
        self.masks = masks or RandomMasks()
        self.align = self.build_aligners()
        self.generation = nn.ModuleList([generation_block(p.teacher_shape.channels) for p in self.pairs])

    @classmethod
    def from_config(cls, node: CfgNode, pairs: Sequence[TapPair]) -> dict[str, Any]:
        return {
            **super().from_config(node, pairs),
            "mask_ratio": node.MASK_RATIO,
            "mask": node.MASK,
            "normalize": node.NORMALIZE,
            "reduction": node.REDUCTION,
            "masks": RandomMasks(seed=node.SEED, stream=comm.get_rank()),
        }

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, keep: Tensor | None = None) -> Tensor:
        """As in the base class; `keep` replaces the random mask: (N, 1, H, W) or (N, C, 1, 1), 1 = kept."""
        student = self.align[level](student)
        if keep is None:
            keep = self.masks(student, self.mask_ratio, self.mask)
        generated = self.generation[level](student * keep.to(student.dtype))
        return squared_error(generated, normalize(teacher, self.normalize), self.reduction)

    def get_extra_state(self) -> dict[str, Any]:
        """The position in the sequence of masks, for `state_dict`."""
        return self.masks.state()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continues the sequence of masks of a checkpoint."""
        self.masks.load_state(state)


def generation_block(channels: int) -> nn.Sequential:
    """Two 3x3 convolutions with a ReLU between them, no norm, as in the paper's section 3.2."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
    )
