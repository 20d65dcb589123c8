"""Which cells learn which objects: those near the center whose anchors overlap most (arXiv 1912.02424)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from detectron2.structures import Boxes, pairwise_iou

#: What is no index of an object: a cell that learns the background.
BACKGROUND = -1


def assign_by_statistics(
    cells: Tensor,
    per_level: Sequence[int],
    boxes: Tensor,
    anchor_scale: float = 8.0,
    candidates: int = 9,
    usable: Tensor | None = None,
) -> Tensor:
    """Gives each object to cells, by a threshold of its own (ATSS; arXiv 1912.02424, algorithm 1).

    Around the center of every cell lies a square anchor. On each level the cells nearest to the center of an object
    are its candidates. It is learned by those whose center is inside it and whose anchor's IoU with it reaches the mean
    over all its candidates plus their (sample) standard deviation. A cell that several objects want learns the one that
    it overlaps most, of equal ones the first; of cells equally near the first is the candidate.

    Args:
        cells: (R, 4) XYXY, squares of the size of the stride around the centers of cells, level by level.
        per_level: cells of each level.
        boxes: (M, 4) XYXY objects.
        anchor_scale: side of an anchor, in strides.
        candidates: of an object on each level, less where there are fewer cells.
        usable: (R,) bool, cells that may be candidates; None for all.

    Returns:
        (R,) int64 index of an object, or `BACKGROUND`.
    """
    if len(boxes) == 0 or len(cells) == 0:
        return torch.full((len(cells),), BACKGROUND, dtype=torch.int64, device=cells.device)
    centers, half = (cells[:, :2] + cells[:, 2:]) / 2, (cells[:, 2:] - cells[:, :2]) * (anchor_scale / 2)
    overlaps = pairwise_iou(Boxes(boxes), Boxes(torch.cat([centers - half, centers + half], dim=1)))  # (M, R)
    distances = ((boxes[:, None, :2] + boxes[:, None, 2:]) / 2 - centers).square().sum(dim=2)
    if usable is not None:
        distances = distances.masked_fill(~usable, torch.inf)
    nearest, start = [], 0
    for of_level in distances.split(list(per_level), dim=1):
        # topk does not promise the first of equal ones
        nearest.append(start + of_level.sort(dim=1, stable=True).indices[:, :candidates])
        start += of_level.shape[1]
    index = torch.cat(nearest, dim=1)
    of_candidates = overlaps.gather(1, index)
    if usable is None:
        deviation = of_candidates.std(dim=1, correction=min(1, index.shape[1] - 1))
        threshold = of_candidates.mean(dim=1) + deviation
    else:  # levels with too few usable cells have others among their nearest, which count nowhere
        counts = usable[index]
        of_candidates = torch.where(counts, of_candidates, 0)
        number = counts.sum(dim=1).clamp(min=1)
        mean = of_candidates.sum(dim=1) / number
        squares = ((of_candidates - mean[:, None]).square() * counts).sum(dim=1)
        threshold = mean + (squares / (number - 1).clamp(min=1)).sqrt()
    # of equal overlaps the mean may be above all of them, by rounding
    best = of_candidates.amax(dim=1)
    threshold = torch.where(threshold - best <= 1e-6, torch.minimum(threshold, best), threshold)
    x, y = centers[index].unbind(dim=2)
    x0, y0, x1, y1 = (side[:, None] for side in boxes.unbind(dim=1))
    inside = (x > x0) & (x < x1) & (y > y0) & (y < y1)
    wanted = inside & (of_candidates >= threshold[:, None])
    if usable is not None:
        wanted &= usable[index]
    claims = torch.full_like(overlaps, -1.0).scatter(1, index, torch.where(wanted, of_candidates, -1.0))
    # argmax promises the first of equal ones
    return torch.where(claims.amax(dim=0) >= 0, claims.argmax(dim=0), BACKGROUND)
