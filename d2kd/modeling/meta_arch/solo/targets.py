"""Which cells of SOLO's grids learn which instance (arXiv 1912.04488, section 3.3.1), without loops over instances."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Level(NamedTuple):
    """A level of the head."""

    #: Cells along a side.
    grid: int
    #: Scales of instances that it learns, root of the area of the box in pixels, both ends included.
    scales: tuple[float, float]
    #: Of its input; masks are predicted at half of it.
    stride: int


class Truth(NamedTuple):
    """The instances of an image that is part of a padded batch."""

    classes: Tensor  # (M,) int64
    boxes: Tensor  # (M, 4) XYXY
    masks: Tensor  # (M, H, W) bool, of the size of the batch


class LevelTargets(NamedTuple):
    """What one level learns of one image."""

    classes: Tensor  # (G, G) int64; the number of classes stands for background
    cells: Tensor  # (P,) ascending numbers of the cells with an instance, row by row
    masks: Tensor  # (P, h, w) bool


def assign_targets(
    truth: Truth, levels: Sequence[Level], sizes: Sequence[tuple[int, int]], num_classes: int, center: float = 0.2
) -> list[LevelTargets]:
    """Returns the targets of every level for one image.

    An instance is learned by the cells that its center region touches, at most one cell around that of its center of
    mass, on every level whose scales include it. Where several want a cell, the last one gets it. Empty masks are left
    out.

    Args:
        truth: the instances.
        levels: see `Level`.
        sizes: (height, width) of the predicted masks of each level.
        num_classes: the label of background.
        center: side of the center region, as a share of that of the box.
    """
    centers = mass_centers(truth.masks)
    sides = (truth.boxes[:, 2:] - truth.boxes[:, :2]).double()  # width, height
    scales = sides.clamp(min=0).prod(1).sqrt()
    occupied = truth.masks.flatten(1).any(1)
    extent = truth.masks.shape[1:]
    found = []
    for level, size in zip(levels, sizes):
        takes_part = occupied & (scales >= level.scales[0]) & (scales <= level.scales[1])
        rows = _near(centers[:, 0], 0.5 * center * sides[:, 1], extent[0], level.grid)
        columns = _near(centers[:, 1], 0.5 * center * sides[:, 0], extent[1], level.grid)
        instances = _last_instance(rows & takes_part[:, None], columns)
        cells = (instances >= 0).nonzero().squeeze(1)
        chosen = instances[cells]
        classes = torch.full_like(instances, num_classes)
        classes[cells] = truth.classes[chosen]
        needed, place = chosen.unique(return_inverse=True)
        masks = shrink_masks(truth.masks[needed], level.stride // 2, size)[place]
        found.append(LevelTargets(classes.view(level.grid, level.grid), cells, masks))
    return found


def mass_centers(masks: Tensor) -> Tensor:
    """Returns the mean row and column of the pixels of masks (M, H, W), (M, 2) float64; 0 and 0 of an empty one."""
    area = masks.flatten(1).sum(1).clamp(min=1)
    means = []
    for other in (2, 1):
        profile = masks.sum(other)
        positions = torch.arange(profile.shape[1], device=masks.device)
        means.append((profile * positions).sum(1).double() / area)
    return torch.stack(means, dim=1)


def shrink_masks(masks: Tensor, factor: int, size: tuple[int, int]) -> Tensor:
    """Shrinks masks as bilinear interpolation of bytes does: a pixel is set where two of the four central ones are.

    Args:
        masks: (M, H, W) bool.
        factor: even; pixels outside of the masks count as empty.
        size: (height, width) of the result.

    Returns:
        (M, height, width) bool.
    """
    missing = [side * factor - have for side, have in zip(size, masks.shape[1:])]
    if any(missing):
        masks = F.pad(masks, (0, missing[1], 0, missing[0]))  # a negative number crops
    first, second = factor // 2 - 1, factor // 2
    rows = masks[:, first::factor].to(torch.uint8) + masks[:, second::factor]
    return rows[:, :, first::factor] + rows[:, :, second::factor] >= 2


def _near(center: Tensor, half: Tensor, extent: int, grid: int) -> Tensor:
    """Which rows (or columns) of a grid a center region touches, at most one away from the center: (M, G) bool."""

    def cell(position: Tensor) -> Tensor:
        return (position / extent / (1 / grid)).long()

    first = torch.maximum(cell(center - half), cell(center) - 1)
    last = torch.minimum(cell(center + half), cell(center) + 1)
    index = torch.arange(grid, device=center.device)
    return (index >= first[:, None]) & (index <= last[:, None])


def _last_instance(rows: Tensor, columns: Tensor) -> Tensor:
    """The last instance that wants each cell, or -1: (G * G,) int64, from (M, G) rows and columns."""
    wanted = (rows[:, :, None] & columns[:, None, :]).flatten(1)
    if not len(wanted):
        return torch.full(wanted.shape[1:], -1, dtype=torch.int64, device=wanted.device)
    number = torch.arange(1, len(wanted) + 1, device=wanted.device)
    return (wanted * number[:, None]).amax(0) - 1
