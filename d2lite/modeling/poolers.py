"""Pooling of regions of interest from one feature map or from a feature pyramid (FPN, arXiv 1612.03144)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchvision.ops import RoIPool

from d2lite.layers import ROIAlign
from d2lite.structures import Boxes

__all__ = ["ROIPooler", "assign_boxes_to_levels", "convert_boxes_to_pooler_format"]


class ROIPooler(nn.Module):
    """Pools every box from the pyramid level that fits its size.

    Args:
        output_size: side, or (height, width), of the pooled grid.
        scales: of each feature map to the input image, finest first; consecutive powers of two such as
            (1/4, 1/8, 1/16).
        sampling_ratio: sampling points per bin and axis in ROIAlign; 0 means as many as the bin has pixels.
        pooler_type: "ROIAlign", "ROIAlignV2" (half-pixel shift corrected) or "ROIPool".
        canonical_box_size: side in pixels of the box that is pooled from `canonical_level`.
        canonical_level: log2 of the stride of that level.

    Raises:
        ValueError: if the scales do not form a pyramid, or the pooler type is unknown.
        NotImplementedError: if the pooler type is for rotated boxes.
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        scales: Sequence[float],
        sampling_ratio: int,
        pooler_type: str,
        canonical_box_size: int = 224,
        canonical_level: int = 4,
    ):
        super().__init__()
        if isinstance(output_size, int):
            output_size = (output_size, output_size)
        if len(output_size) != 2:
            raise ValueError(f"ROIPooler: output_size must be an int or (height, width), got {output_size}")
        if canonical_box_size <= 0:
            raise ValueError(f"ROIPooler: canonical_box_size must be positive, got {canonical_box_size}")
        self.output_size: tuple[int, int] = (int(output_size[0]), int(output_size[1]))
        self.min_level, self.max_level = _pyramid_levels(scales)
        self.canonical_level = canonical_level
        self.canonical_box_size = canonical_box_size
        self.level_poolers = nn.ModuleList(
            _build_level_pooler(pooler_type, self.output_size, scale, int(sampling_ratio)) for scale in scales
        )

    def forward(self, x: list[torch.Tensor], box_lists: list[Boxes]) -> torch.Tensor:
        """Pools all boxes of all images.

        Args:
            x: one (N, C, H, W) feature map per scale.
            box_lists: N boxes objects, in input-image pixels.

        Returns:
            (M, C, output_size[0], output_size[1]), the M boxes in the order of the images. In the autograd
            graph it depends on every map of `x`, even if no box falls on it or there is no box at all.
        """
        num_levels = len(self.level_poolers)
        if len(x) != num_levels:
            raise ValueError(f"ROIPooler got {len(x)} feature maps for its {num_levels} scales")
        if len(box_lists) != x[0].size(0):
            raise ValueError(f"ROIPooler got boxes of {len(box_lists)} images for features of {x[0].size(0)} images")
        rois = convert_boxes_to_pooler_format(box_lists).to(x[0].device)
        if len(x) == 1:
            return self.level_poolers[0](x[0], rois)

        if not torch.jit.is_scripting() and not torch.jit.is_tracing():
            order, sizes = _sort_once(self, box_lists, rois.device)
        else:
            order, sizes = self.sort_by_level(box_lists, rois.device)
        parts = rois[order].split(sizes)
        pooled: list[torch.Tensor] = []
        for i, pool in enumerate(self.level_poolers):
            pooled.append(pool(x[i], parts[i]))
        if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return torch.cat(pooled).index_select(0, torch.argsort(order))
        return _Unsorted.apply(order, *pooled)

    def sort_by_level(self, box_lists: list[Boxes], device: torch.device) -> tuple[torch.Tensor, list[int]]:
        """The order (M,) of all boxes by their levels, and how many there are on each.

        It synchronizes with the device once, for these counts, instead of once per level.
        """
        levels = assign_boxes_to_levels(
            box_lists, self.min_level, self.max_level, self.canonical_box_size, self.canonical_level
        ).to(device)
        numbers = torch.arange(self.max_level - self.min_level + 1, device=device)
        return torch.argsort(levels, stable=True), _sizes((levels[:, None] == numbers).sum(0))


class _Unsorted(torch.autograd.Function):
    """Rows in the order of their boxes: `cat(parts)[argsort(order)]`, and its gradient, with one copy each."""

    @staticmethod
    def forward(ctx: Any, order: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        ctx.places = order.split([len(part) for part in parts])
        rows = parts[0].new_empty((len(order), *parts[0].shape[1:]))
        for place, part in zip(ctx.places, parts):
            rows.index_copy_(0, place, part)
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *[gradient.index_select(0, place) for place in ctx.places]


def _sort_once(pooler: ROIPooler, box_lists: list[Boxes], device: torch.device) -> tuple[torch.Tensor, list[int]]:
    """As `sort_by_level`, for the same boxes once: another pooler of such levels does not wait for the counts again.

    It is kept with the first boxes, as long as these, and for tensors that have not changed.
    """
    tensors = [boxes.tensor for boxes in box_lists]
    if not tensors or torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in tensors):
        return pooler.sort_by_level(box_lists, device)
    levels = (pooler.min_level, pooler.max_level, pooler.canonical_box_size, pooler.canonical_level, device)
    now = (levels, [(id(tensor), tensor._version) for tensor in tensors])
    kept = getattr(box_lists[0], "_sorted_by_level", None)
    if kept is None or kept[0] != now:
        # with the tensors, so that no other ones can have their identity
        kept = (now, tensors, pooler.sort_by_level(box_lists, device))
        box_lists[0]._sorted_by_level = kept
    return kept[2]


def assign_boxes_to_levels(
    box_lists: list[Boxes],
    min_level: int,
    max_level: int,
    canonical_box_size: int,
    canonical_level: int,
) -> torch.Tensor:
    """Level of each box by its size, equation 1 of the FPN paper.

    Returns:
        (M,) int64, 0 for `min_level` and `max_level - min_level` for the coarsest.
    """
    if len(box_lists) == 0:
        return torch.zeros(0, dtype=torch.int64)
    sizes = torch.cat([boxes.area() for boxes in box_lists]).sqrt()
    # the small term keeps the logarithm finite for boxes without area
    levels = torch.floor(canonical_level + torch.log2(sizes / canonical_box_size + 1e-8))
    return levels.clamp(min=min_level, max=max_level).to(torch.int64) - min_level


def convert_boxes_to_pooler_format(box_lists: list[Boxes]) -> torch.Tensor:
    """Boxes of N images as one (M, 5) tensor: index of the image in the batch, then XYXY in pixels."""
    if len(box_lists) == 0:
        return torch.zeros(0, 5)
    rois: list[torch.Tensor] = []
    for i, boxes in enumerate(box_lists):
        index = torch.full_like(boxes.tensor[:, :1], float(i))
        rois.append(torch.cat([index, boxes.tensor], dim=1))
    return torch.cat(rois)


def _sizes(counts: torch.Tensor) -> list[int]:
    """Copies integers from the device; a trace keeps them as tensors, so that it is valid for other inputs."""
    if not torch.jit.is_scripting() and torch.jit.is_tracing():
        return list(counts.unbind())
    sizes: list[int] = counts.tolist()
    return sizes


def _pyramid_levels(scales: Sequence[float]) -> tuple[int, int]:
    levels = [-math.log2(scale) for scale in scales]
    first = round(levels[0]) if levels else 0
    if not levels or first < 0 or any(abs(level - first - i) > 1e-6 for i, level in enumerate(levels)):
        raise ValueError(
            "ROIPooler: the feature maps must form a pyramid, each with twice the stride of the one before it"
            f" and none larger than the image; got scales {tuple(scales)}"
        )
    return first, first + len(levels) - 1


def _build_level_pooler(kind: str, size: tuple[int, int], scale: float, sampling_ratio: int) -> nn.Module:
    if kind == "ROIPool":
        return RoIPool(size, spatial_scale=scale)
    if kind in ("ROIAlign", "ROIAlignV2"):
        return ROIAlign(size, spatial_scale=scale, sampling_ratio=sampling_ratio, aligned=kind == "ROIAlignV2")
    if kind == "ROIAlignRotated":
        raise NotImplementedError(
            "POOLER_TYPE ROIAlignRotated (rotated boxes) is not part of d2lite; install Detectron2 to use it"
        )
    raise ValueError(f"Unknown pooler type {kind!r}; use ROIAlign, ROIAlignV2 or ROIPool")
