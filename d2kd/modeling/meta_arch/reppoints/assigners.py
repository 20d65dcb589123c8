"""Which locations learn which objects: by distance for the first points, by overlap for the refined ones."""

import torch
from torch import Tensor

#: What is no index of an object: a location that learns the background, and one that learns nothing.
BACKGROUND, IGNORED = -1, -2
#: Least side (pixels) or area that is divided by.
EPS = 1e-6


def assign_by_distance(xy: Tensor, strides: Tensor, boxes: Tensor, scale: float = 4.0, count: int = 1) -> Tensor:
    """Gives each object to the locations nearest to its center (arXiv 1904.11490, section 4.2, first stage).

    An object is learned on the level whose stride is nearest to its size: log2 of the stride is the mean of
    log2(w / scale) and log2(h / scale), truncated and limited to the levels there are. Distances are in widths and
    heights of the object. A location that several objects want goes to the nearest, of equally near ones to the first.

    Args:
        xy: (R, 2) locations in pixels.
        strides: (R,) their strides, powers of 2.
        boxes: (M, 4) objects.
        scale: sides of an object, in strides, on the level that learns it.
        count: locations for each object, less where others take them.

    Returns:
        (R,) int64 index of an object, or `BACKGROUND`.
    """
    matches = torch.full((len(xy),), BACKGROUND, dtype=torch.int64, device=xy.device)
    if len(boxes) == 0 or len(xy) == 0:
        return matches
    levels = strides.log2().round().int()
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=EPS)
    logs = (sides / scale).log2()
    box_levels = ((logs[:, 0] + logs[:, 1]) / 2).int().clamp(levels.min(), levels.max())
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    distances = ((xy[None] - centers[:, None]) / sides[:, None]).norm(dim=2)  # (M, R)
    distances = distances.masked_fill(levels[None] != box_levels[:, None], torch.inf)

    nearest, index = _smallest(distances, count)
    owners = torch.arange(len(boxes), device=xy.device)[:, None].expand_as(index)
    wanted = nearest.isfinite()
    index, nearest, owners = index[wanted], nearest[wanted], owners[wanted]
    best = distances.new_full((len(xy),), torch.inf).scatter_reduce(0, index, nearest, "amin")
    wins = nearest == best[index]
    first = matches.new_full((len(xy),), len(boxes)).scatter_reduce(0, index[wins], owners[wins], "amin")
    return torch.where(first < len(boxes), first, matches)


def _smallest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The smallest values of each row, of equal ones the first, which `topk` does not promise; with their places."""
    if count == 1:
        least = values.min(dim=1, keepdim=True)
        return least.values, least.indices
    ordered = values.sort(dim=1, stable=True)
    return ordered.values[:, :count], ordered.indices[:, :count]


def assign_by_overlap(
    candidates: Tensor, boxes: Tensor, background_below: float = 0.4, foreground: float = 0.5
) -> Tensor:
    """Gives each object to the boxes that overlap it (arXiv 1904.11490, section 4.2, second stage).

    A candidate learns the object that it overlaps most, of equal ones the first, from IoU `foreground` on. Besides,
    every object takes all candidates that reach its highest IoU, even if that is 0; a later object takes them from an
    earlier one.

    Args:
        candidates: (R, 4) boxes.
        boxes: (M, 4) objects.
        background_below: a candidate whose highest IoU is below this learns the background.
        foreground: least IoU of a match; candidates in between learn nothing.

    Returns:
        (R,) int64 index of an object, `BACKGROUND` or `IGNORED`.
    """
    matches = torch.full((len(candidates),), IGNORED, dtype=torch.int64, device=candidates.device)
    if len(boxes) == 0 or len(candidates) == 0:
        return matches.fill_(BACKGROUND)
    overlaps = pairwise_iou(boxes, candidates)  # (M, R)
    highest = overlaps.amax(dim=0)
    # argmax promises the first of equal ones
    matches = torch.where(highest >= foreground, overlaps.argmax(dim=0), matches)
    matches = torch.where(highest < background_below, BACKGROUND, matches)
    reached = overlaps == overlaps.amax(dim=1, keepdim=True)
    order = torch.arange(1, len(boxes) + 1, device=boxes.device)[:, None]
    last = (reached * order).amax(dim=0)
    return torch.where(last > 0, last - 1, matches)


def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Returns the IoU of boxes (M, 4) with others (R, 4), (M, R); two empty boxes have 0."""
    corner = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = (corner - torch.maximum(boxes[:, None, :2], others[None, :, :2])).clamp(min=0).prod(dim=2)
    areas, other_areas = ((b[:, 2:] - b[:, :2]).prod(dim=1) for b in (boxes, others))
    return shared / (areas[:, None] + other_areas[None] - shared).clamp(min=EPS)
