"""The head of RepPoints: first points, and classes and corrections read there (arXiv 1904.11490, figure 2)."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kd.layers import upcast_half
from detectron2.layers import Conv2d, DeformConv, get_norm

from .points import slow_gradient


class PointMaps(NamedTuple):
    """What the head predicts, a list with one map a level each."""

    #: (N, K, Hi, Wi)
    logits: list[Tensor]
    #: (N, 2P, Hi, Wi): y and x of each point, in strides from its location.
    initial: list[Tensor]
    #: (N, 2P, Hi, Wi): the same points, corrected.
    refined: list[Tensor]


class RepPointsHead(nn.Module):
    """Predicts points, and reads classes and a correction of the points there by deformable convolutions.

    Its layers are shared by all levels and run once on each, so that `cls_score@0` is the tap of the finest level.
    """

    #: Where the taps of a convolution are without offsets: (1, 2P, 1, 1), y and x in turn.
    taps: Tensor

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        conv_dim: int = 256,
        point_dim: int = 256,
        num_convs: int = 3,
        num_points: int = 9,
        norm: str = "GN",
        prior_prob: float = 0.01,
        gradient_multiplier: float = 0.1,
    ) -> None:
        """
        Args:
            in_channels: C, of the features.
            num_classes: K, without background.
            conv_dim: channels of the two branches.
            point_dim: channels of the convolutions at the points.
            num_convs: convolutions in each of the two branches.
            num_points: P, the square of an odd number: as many as a deformable convolution has taps.
            norm: normalization in the branches, as for Detectron2's `get_norm`.
            prior_prob: score that the untrained head gives to every class.
            gradient_multiplier: factor on the gradient that the first points get from what is read there.

        Raises:
            ValueError: `num_points` is not the square of an odd number.
        """
        super().__init__()
        side = math.isqrt(num_points)
        if side * side != num_points or side % 2 == 0:
            raise ValueError(f"num_points is {num_points}; it must be the square of an odd number.")
        self.num_points = num_points
        self.gradient_multiplier = gradient_multiplier
        self.cls_subnet = _branch(in_channels, conv_dim, num_convs, norm)
        self.point_subnet = _branch(in_channels, conv_dim, num_convs, norm)
        channels = conv_dim if num_convs else in_channels
        self.initial_conv = Conv2d(channels, point_dim, 3, padding=1, activation=F.relu)
        self.initial_points = Conv2d(point_dim, 2 * num_points, 1)
        at_points: dict[str, Any] = {"kernel_size": side, "padding": side // 2, "activation": F.relu}
        self.cls_conv = DeformConv(channels, point_dim, **at_points)
        self.cls_score = Conv2d(point_dim, num_classes, 1)
        self.refined_conv = DeformConv(channels, point_dim, **at_points)
        #: gives the correction of the first points
        self.refined_points = Conv2d(point_dim, 2 * num_points, 1)
        steps = torch.arange(side) - side // 2
        grid = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1)
        self.register_buffer("taps", grid.float().view(1, -1, 1, 1), persistent=False)
        self._init_weights(prior_prob)

    def _init_weights(self, prior_prob: float) -> None:
        """Deformable convolutions keep their own initialization."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.cls_score.bias, -math.log((1 - prior_prob) / prior_prob))

    def forward(self, features: list[Tensor]) -> PointMaps:
        """
        Args:
            features: (N, C, Hi, Wi) of each level.
        """
        return PointMaps(*(list(maps) for maps in zip(*map(self._on_level, features))))

    def _on_level(self, feature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cls_feature, point_feature = self.cls_subnet(feature), self.point_subnet(feature)
        initial = upcast_half(self.initial_points(self.initial_conv(point_feature)))
        offsets = slow_gradient(initial, self.gradient_multiplier) - self.taps
        logits = self.cls_score(_convolve_at(self.cls_conv, cls_feature, offsets))
        correction = self.refined_points(_convolve_at(self.refined_conv, point_feature, offsets))
        return logits, initial, upcast_half(correction) + initial.detach()


def _branch(in_channels: int, channels: int, count: int, norm: str) -> nn.Sequential:
    layers = []
    for i in range(count):
        layers.append(
            Conv2d(
                channels if i else in_channels,
                channels,
                kernel_size=3,
                padding=1,
                bias=not norm,
                norm=get_norm(norm, channels),
                activation=F.relu,
            )
        )
    return nn.Sequential(*layers)


def _convolve_at(conv: nn.Module, x: Tensor, offsets: Tensor) -> Tensor:
    """A deformable convolution, in float32 at least: its operator has no half precision on all devices."""
    with torch.autocast(x.device.type, enabled=False):
        return conv(upcast_half(x), upcast_half(offsets))
