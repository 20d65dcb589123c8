"""The head of GFL: that of RetinaNet, with a distribution for each side of the one box of a cell."""

from typing import Any

import torch
from torch import Tensor, nn

from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead

from .distribution import SIDES


class LevelScaledConv2d(nn.Conv2d):
    """A convolution that all levels share, with a learned factor for each."""

    def __init__(self, *args: Any, num_levels: int, **kwargs: Any) -> None:
        """
        Args:
            args, kwargs: of `nn.Conv2d`.
            num_levels: that it is called for.
        """
        super().__init__(*args, **kwargs)
        self.scales = nn.Parameter(torch.ones(num_levels))

    def forward(self, feature: Tensor, level: int) -> Tensor:  # type: ignore[override]
        """(N, C, H, W) of a level, and its number."""
        return super().forward(feature) * self.scales[level]


class GFLHead(RetinaNetHead):
    """Two branches of convolutions for classes and boxes (arXiv 2006.04388, figure 1).

    Its layers are shared by all levels and run once on each, so that `bbox_pred@0` is the tap of the finest level.
    """

    def __init__(self, *, input_shape: list[ShapeSpec], conv_dims: list[int], num_bins: int, **kwargs: Any) -> None:
        """
        Args:
            input_shape, conv_dims: see Detectron2's `RetinaNetHead`.
            num_bins: B, whole numbers of strides, from 0, that the distance to a side is a mean of.
            kwargs: `num_classes`, `norm` and `prior_prob` of `RetinaNetHead`.
        """
        super().__init__(input_shape=input_shape, conv_dims=conv_dims, num_anchors=1, **kwargs)
        self.num_bins = num_bins
        self.bbox_pred = LevelScaledConv2d(conv_dims[-1], SIDES * num_bins, 3, padding=1, num_levels=len(input_shape))
        nn.init.normal_(self.bbox_pred.weight, std=0.01)
        assert self.bbox_pred.bias is not None
        nn.init.zeros_(self.bbox_pred.bias)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """
        Args:
            features: (N, C, Hi, Wi) of each level.

        Returns:
            Logits (N, K, Hi, Wi), whose sigmoid is the overlap of the box with an object of the class, and logits
            (N, 4 * B, Hi, Wi) of the distances to left, top, right and bottom, of each level.
        """
        logits = [self.cls_score(self.cls_subnet(x)) for x in features]
        return logits, [self.bbox_pred(self.bbox_subnet(x), level) for level, x in enumerate(features)]
