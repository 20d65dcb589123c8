"""From the outputs of SOLO's head to the instances of an image (arXiv 1912.04488, section 3.4), in bounded memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from d2kd.layers import upcast_half
from detectron2.structures import Boxes, Instances

from .head import BaseSOLOHead, MaskMaps
from .matrix_nms import FinalScores, greedy_nms, mask_overlaps, matrix_nms

#: How duplicates are treated: matrix NMS with a gaussian or linear kernel, or greedy NMS on masks.
NMS = ("gaussian", "linear", "mask")

#: Pixels of soft masks that exist at a time.
_CHUNK = 2**25
#: Pixels of binary masks, of a byte each, that are kept instead of made again.
_KEPT = 2**27


@dataclass(frozen=True)
class Thresholds:
    """What becomes a detection."""

    score: float = 0.1  # least score of a class
    mask: float = 0.5  # least probability of a pixel
    nms: str = "gaussian"  # see `NMS`
    sigma: float = 2.0  # of the gaussian
    overlap: float = 0.5  # mask IoU that suppresses, for greedy NMS
    candidates: int = 500  # that enter NMS
    final_score: float = 0.05  # least score after NMS
    limit: int = 100  # detections of an image


@dataclass(frozen=True)
class Sizes:
    """Heights and widths, from the head to the output."""

    masks: tuple[int, int]  # at which masks are compared, a quarter of the padded image
    image: tuple[int, int]  # of the network's input, without padding
    output: tuple[int, int]


def point_nms(scores: Tensor) -> Tensor:
    """Keeps scores (N, K, G, G) that no upper, left or upper left neighbor exceeds; others become 0."""
    best = F.max_pool2d(F.pad(scores, (1, 0, 1, 0)), kernel_size=2, stride=1)
    return scores.where(scores == best, 0)


class Masks:
    """The masks of an image by their cells, numbered over all levels; made from the head's maps when asked for."""

    def __init__(self, head: BaseSOLOHead, maps: Sequence[MaskMaps], image: int, size: tuple[int, int]) -> None:
        """
        Args:
            head: gives them.
            maps: its mask maps of every level.
            image: place of the image in the batch.
            size: (height, width) that they are wanted in.
        """
        self.head, self.maps, self.image, self.size = head, maps, image, size
        self.counts = [grid**2 for grid in head.grids]

    def soft(self, cells: Tensor) -> Tensor:
        """Returns the probabilities (P, H, W) of ascending cells."""
        found, start = [], 0
        for level, count in enumerate(self.counts):
            mine = cells[(cells >= start) & (cells < start + count)] - start
            if len(mine):
                found.append(self.head.cell_masks(level, self.maps[level], self.image, mine, self.size))
            start += count
        return torch.cat(found)

    def chunks(self, cells: Tensor) -> Iterator[Tensor]:
        """Yields the probabilities of ascending cells, some at a time."""
        for part in cells.split(max(1, _CHUNK // (self.size[0] * self.size[1]))):
            if len(part):
                yield self.soft(part)

    def measure(self, cells: Tensor, threshold: float) -> "MeasuredMasks":
        """Returns areas and mean probabilities of the masks of ascending cells, and the masks if they are not large."""
        areas, sums, kept = [], [], []
        keeps = len(cells) * self.size[0] * self.size[1] <= _KEPT
        for soft in self.chunks(cells):
            inside = soft > threshold
            ones = inside.flatten(1).to(soft.dtype)
            areas.append(ones.sum(1))
            sums.append(torch.linalg.vecdot(soft.flatten(1), ones))
            kept += [inside] if keeps else []
        if not areas:
            nothing = torch.zeros(0, device=cells.device)
            return MeasuredMasks(
                cells, nothing, nothing, torch.zeros(0, *self.size, dtype=torch.bool).to(nothing.device)
            )
        area = torch.cat(areas)
        return MeasuredMasks(cells, area, torch.cat(sums) / area.clamp(min=1), torch.cat(kept) if keeps else None)

    def binary(self, cells: Tensor, threshold: float, measured: "MeasuredMasks") -> Tensor:
        """Returns which pixels (P, H, W) of some of the measured cells are above the threshold."""
        if measured.inside is None and len(cells):
            return torch.cat([soft > threshold for soft in self.chunks(cells)])
        if measured.inside is None:
            return torch.zeros(0, *self.size, dtype=torch.bool, device=cells.device)
        if len(cells) == len(measured.cells):
            return measured.inside
        return measured.inside[torch.searchsorted(measured.cells, cells)]


class MeasuredMasks(NamedTuple):
    """Masks of ascending cells."""

    cells: Tensor  # (P,)
    area: Tensor  # (P,) pixels above the threshold
    quality: Tensor  # (P,) mean probability of these; 0 without any
    inside: Tensor | None  # (P, H, W) bool; None where that is too large


@torch.no_grad()
def detect(
    scores: Sequence[Tensor], masks: Masks, strides: Sequence[int], sizes: Sizes, thresholds: Thresholds
) -> Instances:
    """Returns the instances of an image, best first.

    Args:
        scores: (K, G, G) of each level, after `point_nms`.
        masks: of the same image.
        strides: of the levels.
        sizes: see `Sizes`.
        thresholds: see `Thresholds`.

    Returns:
        `Instances` of the output's size with `pred_masks` (N, H, W) bool, `pred_boxes` (tight around them), `scores`
        and `pred_classes`. A mask may have no pixel left in the output; its box is 0, 0, 0, 0.
    """
    cells, classes, values, overlaps = _candidates(scores, masks, strides, thresholds)
    final = FinalScores(thresholds.final_score, thresholds.limit)
    if thresholds.nms == "mask":
        values, kept = greedy_nms(overlaps, classes, values, thresholds.overlap, final)
    else:
        values, kept = matrix_nms(overlaps, classes, values, thresholds.nms, thresholds.sigma, final)
    found = Instances(sizes.output)
    found.pred_masks = _full_masks(masks, cells[kept], sizes, thresholds.mask)
    found.pred_boxes = Boxes(tight_boxes(found.pred_masks))
    found.scores, found.pred_classes = values, classes[kept]
    return found


def _candidates(
    scores: Sequence[Tensor], masks: Masks, strides: Sequence[int], thresholds: Thresholds
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cells, classes, scores times mask quality (best first) and overlaps (N, N) of what enters NMS."""
    table = torch.cat([upcast_half(level).flatten(1) for level in scores], dim=1).T
    cells, classes = (table > thresholds.score).nonzero(as_tuple=True)
    values = table[cells, classes]
    shown, place = cells.unique(return_inverse=True)  # several classes may want the same cell, and share its mask
    measured = masks.measure(shown, thresholds.mask)
    stride = torch.cat([cells.new_full((count,), stride) for count, stride in zip(masks.counts, strides)])
    values = values * measured.quality[place]
    large = (measured.area > stride[shown])[place].nonzero().squeeze(1)
    best = large[values[large].argsort(descending=True, stable=True)[: thresholds.candidates]]
    cells, classes, values = cells[best], classes[best], values[best]
    shown, place = cells.unique(return_inverse=True)
    overlaps = mask_overlaps(masks.binary(shown, thresholds.mask, measured), values.dtype)
    return cells, classes, values, overlaps[place[:, None], place]


def _full_masks(masks: Masks, cells: Tensor, sizes: Sizes, threshold: float) -> Tensor:
    """The masks of some cells in the size of the output, (N, *sizes.output) bool."""
    full = torch.empty(len(cells), *sizes.output, dtype=torch.bool, device=cells.device)
    ascending, order = cells.sort()
    start, pixels = 0, max(16 * sizes.masks[0] * sizes.masks[1], sizes.output[0] * sizes.output[1])
    for soft in masks.chunks(ascending):
        for part in soft.split(max(1, _CHUNK // pixels)):
            full[order[start : start + len(part)]] = resize_masks(part, sizes, threshold)
            start += len(part)
    return full


def resize_masks(soft: Tensor, sizes: Sizes, threshold: float) -> Tensor:
    """Returns masks (P, h, w), probabilities at a quarter of the padded image, as (P, *sizes.output) bool."""
    height, width = sizes.masks
    large = F.interpolate(soft[None], size=(4 * height, 4 * width), mode="bilinear", align_corners=False)
    large = large[..., : sizes.image[0], : sizes.image[1]]
    if tuple(large.shape[2:]) != tuple(sizes.output):
        large = F.interpolate(large, size=sizes.output, mode="bilinear", align_corners=False)
    return large[0] > threshold


def tight_boxes(masks: Tensor) -> Tensor:
    """Returns the boxes (N, 4) XYXY around the pixels of masks (N, H, W); 0, 0, 0, 0 of an empty one."""
    ends = []
    for other in (1, 2):
        occupied = masks.any(other)
        position = torch.arange(occupied.shape[1], device=masks.device)
        last = torch.where(occupied, position + 1, 0).amax(1)
        first = torch.where(occupied, position, occupied.shape[1]).amin(1).minimum(last)
        ends += [first, last]
    x0, x1, y0, y1 = ends
    return torch.stack([x0, y0, x1, y1], dim=1).float()
