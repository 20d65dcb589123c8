"""Points of feature maps: where the locations are, and which box some points span (arXiv 1904.11490, section 3)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from d2kd.layers import upcast_half

#: How a set of points becomes a box: values of MODEL.REPPOINTS.TRANSFORM.
TRANSFORMS = ("moment", "minmax", "partial_minmax")


class Locations(NamedTuple):
    """The locations of all levels, finest level first, row by row: R of them."""

    #: (R, 2) x and y in pixels: multiples of the stride.
    xy: Tensor
    #: (R,) in pixels.
    strides: Tensor
    #: Locations of each level.
    per_level: list[int]

    def inside(self, height: int, width: int) -> Tensor:
        """Returns which locations belong to an image of this size, (R,) bool: others are padding of the batch."""
        return (self.xy[:, 0] < width) & (self.xy[:, 1] < height)


def locations_of(maps: Sequence[Tensor], strides: Sequence[int]) -> Locations:
    """Returns the locations of maps (N, C, Hi, Wi), in float32 or the maps' float64."""
    dtype, device = upcast_half(maps[0]).dtype, maps[0].device
    xy = []
    for level, stride in zip(maps, strides):
        rows, columns = (torch.arange(size, dtype=dtype, device=device) * stride for size in level.shape[-2:])
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        xy.append(torch.stack([x, y], dim=-1).flatten(0, 1))
    per_level = [len(level) for level in xy]
    # filled there: numbers that are made here would have to be copied, and the host would wait
    of_level = [level.new_full((len(level),), stride) for level, stride in zip(xy, strides)]
    return Locations(torch.cat(xy), torch.cat(of_level), per_level)


def flatten_levels(maps: Sequence[Tensor]) -> Tensor:
    """Joins maps (N, C, Hi, Wi) of all levels to (N, R, C), in float32 or more: targets and boxes need the digits."""
    return torch.cat([upcast_half(level).flatten(2).transpose(1, 2) for level in maps], dim=1)


def as_points(channels: Tensor) -> Tensor:
    """Turns the channels of a point map, (..., 2P) as y0, x0, y1, x1, ..., into points (..., P, 2) of x and y."""
    return channels.unflatten(-1, (-1, 2)).flip(-1)


def place(values: Tensor, xy: Tensor, strides: Tensor) -> Tensor:
    """Brings points or boxes from strides around their location to pixels of the image.

    Args:
        values: (..., R, P, 2) points or (..., R, 4) boxes, in strides.
        xy: (R, 2) locations in pixels.
        strides: (R,) in pixels.
    """
    if values.dim() > xy.dim() and values.shape[-1] == 2:
        return values * strides[:, None, None] + xy[:, None]
    return values * strides[:, None] + xy.repeat(1, 2)


class MomentTransform(nn.Module):
    """The box around the mean of the points whose sides are learned multiples of their standard deviation.

    Half the side is sigma * exp(m), with one number m for widths and one for heights (arXiv 1904.11490, section 3.2).
    """

    def __init__(self, multiplier: float = 0.01) -> None:
        """
        Args:
            multiplier: factor on the gradient of m, which gets one from every box.
        """
        super().__init__()
        self.multiplier = multiplier
        #: m of widths and heights
        self.log_scale = nn.Parameter(torch.zeros(2))

    def forward(self, points: Tensor) -> Tensor:
        """(..., P, 2) points of x and y -> (..., 4) boxes; the deviation of points in one place has gradient 0."""
        scale = slow_gradient(self.log_scale.to(points.dtype), self.multiplier).exp()
        center = points.mean(dim=-2)
        # unbiased; torch's warns where there are no boxes
        variance = (points - center[..., None, :]).square().sum(dim=-2) / (points.shape[-2] - 1)
        spread = variance > 0
        half = torch.where(spread, torch.where(spread, variance, 1).sqrt(), 0) * scale
        return torch.cat([center - half, center + half], dim=-1)


class MinMaxTransform(nn.Module):
    """The smallest box around the points, or around the first of them."""

    def __init__(self, first: int | None = None) -> None:
        """
        Args:
            first: how many of the points count; None for all.
        """
        super().__init__()
        self.first = first

    def forward(self, points: Tensor) -> Tensor:
        """(..., P, 2) points of x and y -> (..., 4) boxes."""
        counted = points[..., : self.first, :]
        return torch.cat([counted.min(dim=-2).values, counted.max(dim=-2).values], dim=-1)


def build_transform(name: str, moment_multiplier: float = 0.01) -> nn.Module:
    """Returns the transform of a name in `TRANSFORMS`."""
    if name == "moment":
        return MomentTransform(moment_multiplier)
    return MinMaxTransform(None if name == "minmax" else 4)


def slow_gradient(x: Tensor, multiplier: float) -> Tensor:
    """Returns x itself, whose gradient is multiplied by `multiplier`."""
    return multiplier * x + (1 - multiplier) * x.detach()
