"""The pyramid pooling module of PSPNet (arXiv 1612.01105, section 3.2)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import conv_block


class PyramidPooling(nn.Module):
    """A map beside its means over 1x1, 2x2, 3x3 and 6x6 regions, brought together by a 3x3 convolution."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        out_channels: int,
        *,
        scales: Sequence[int] = (1, 2, 3, 6),
        align_corners: bool = False,
        norm: str = "BN",
    ) -> None:
        """
        Args:
            in_channels: of the map.
            channels: of the 1x1 convolution behind each pooling.
            out_channels: of the 3x3 convolution.
            scales: regions along each side of the map.
            align_corners: how the pooled maps are resized, see `resize_logits`.
            norm: behind every convolution, by Detectron2's name.
        """
        super().__init__()
        self.scales = tuple(scales)
        self.align_corners = align_corners
        self.branches = nn.ModuleList([conv_block(in_channels, channels, 1, norm) for _ in self.scales])
        self.bottleneck = conv_block(in_channels + channels * len(self.scales), out_channels, 3, norm)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H, W)."""
        maps = [x]
        for scale, branch in zip(self.scales, self.branches):
            pooled = branch(F.adaptive_avg_pool2d(x, scale))
            maps.append(F.interpolate(pooled, x.shape[-2:], mode="bilinear", align_corners=self.align_corners))
        return self.bottleneck(torch.cat(maps, dim=1))
