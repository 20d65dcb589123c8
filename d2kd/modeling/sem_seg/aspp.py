"""Atrous spatial pyramid pooling: DeepLabV3's view of the surroundings of a pixel (arXiv 1706.05587, section 3.3)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import conv_block

#: Values of MODEL.SEM_SEG_HEAD.ASPP_FORM.
ASPP_FORMS = ("project", "bottleneck")


class ASPP(nn.Module):
    """A 1x1 convolution, 3x3 convolutions of several dilations, and the mean of the image, side by side.

    In the form "project" (the paper's, torchvision's too) they are brought together by a 1x1 convolution with dropout,
    behind which stands a 3x3 one; in the form "bottleneck" (mmsegmentation's) by the 3x3 convolution alone. Branches
    are concatenated in the order of published weights: the mean of the image is last in the one form, first in the
    other.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        out_channels: int,
        *,
        dilations: Sequence[int] = (12, 24, 36),
        form: str = "project",
        dropout: float = 0.5,
        norm: str = "BN",
    ) -> None:
        """
        Args:
            in_channels: of the map.
            channels: of every branch, and of the 1x1 convolution behind them.
            out_channels: of the 3x3 convolution at the end.
            dilations: of the 3x3 convolutions, in cells.
            form: one of `ASPP_FORMS`.
            dropout: behind the 1x1 convolution of the form "project".
            norm: behind every convolution, by Detectron2's name.
        """
        super().__init__()
        self.pooled = conv_block(in_channels, channels, 1, norm)
        self.branches = nn.ModuleList(
            [conv_block(in_channels, channels, 1, norm)]
            + [conv_block(in_channels, channels, 3, norm, dilation) for dilation in dilations]
        )
        joined = channels * (len(self.branches) + 1)
        self.project = conv_block(joined, channels, 1, norm) if form == "project" else None
        self.dropout = nn.Dropout(dropout)
        self.bottleneck = conv_block(joined if self.project is None else channels, out_channels, 3, norm)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H, W)."""
        maps = [branch(x) for branch in self.branches]
        mean = self.pooled(F.adaptive_avg_pool2d(x, 1)).expand(-1, -1, *x.shape[-2:])
        if self.project is None:
            return self.bottleneck(torch.cat([mean, *maps], dim=1))
        return self.bottleneck(self.dropout(self.project(torch.cat([*maps, mean], dim=1))))
