"""Suppression of duplicate masks: matrix NMS (arXiv 2003.10152, section 3.3), and the usual greedy one."""

from typing import NamedTuple

import torch
from torch import Tensor

KERNELS = ("gaussian", "linear")

#: Pixels of all masks that are multiplied at a time.
_CHUNK = 2**25


def mask_overlaps(masks: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns the IoU of all pairs of masks, (N, N), by one matrix product; 0 for two empty ones.

    Args:
        masks: (N, H, W) bool.
        dtype: of the result.
    """
    flat = masks.flatten(1)
    shared = torch.zeros(len(flat), len(flat), device=masks.device)
    for part in flat.split(max(1, _CHUNK // max(1, len(flat))), dim=1):
        values = part.float()
        shared.addmm_(values, values.T)
    shared = shared.to(dtype)
    areas = shared.diagonal()
    return shared / (areas[:, None] + areas - shared).clamp(min=1)


def duplicate_overlaps(overlaps: Tensor, classes: Tensor) -> Tensor:
    """Keeps of overlaps (N, N) those of a better mask (row) with a worse one (column) of its class; others are 0."""
    return overlaps.where(classes[:, None] == classes, 0).triu(diagonal=1)


def matrix_decay(duplicates: Tensor, kernel: str = "gaussian", sigma: float = 2.0) -> Tensor:
    """Returns what matrix NMS multiplies every score with, (N,) in [0, 1].

    decay_j = min_i f(iou_ij) / f(c_i), where c_i = max_k iou_ki tells how much i itself is a duplicate, and
    f(iou) = exp(-sigma iou^2) or 1 - iou.

    Args:
        duplicates: (N, N), the best mask first, see `duplicate_overlaps`.
        kernel: "gaussian" or "linear".
        sigma: of the gaussian.
    """
    if not len(duplicates):
        return duplicates.new_ones(0)
    own = duplicates.amax(0)[:, None]
    if kernel == "gaussian":
        decay = torch.exp(-sigma * (duplicates.square() - own.square()))
    else:
        # a perfect duplicate says nothing about third ones: what it duplicates does, and 0 / 0 must not
        decay = (1 - duplicates) / (1 - own).clamp(min=torch.finfo(own.dtype).eps)
    return decay.amin(0)


class FinalScores(NamedTuple):
    """Which masks are left after NMS."""

    #: Lower scores are dropped; 0 drops none.
    threshold: float = 0.0
    #: How many of the best are kept.
    limit: int = 100


def matrix_nms(
    overlaps: Tensor,
    classes: Tensor,
    scores: Tensor,
    kernel: str = "gaussian",
    sigma: float = 2.0,
    final: FinalScores = FinalScores(),
) -> tuple[Tensor, Tensor]:
    """Lowers the scores of duplicates instead of removing them, all at once.

    Args:
        overlaps: (N, N) IoU of the masks.
        classes: (N,).
        scores: (N,) in descending order.
        kernel, sigma: see `matrix_decay`.
        final: what is left.

    Returns:
        The lowered scores in descending order, and the places of these masks in the input.
    """
    lowered = scores * matrix_decay(duplicate_overlaps(overlaps, classes), kernel, sigma)
    lowered, order = lowered.sort(descending=True, stable=True)
    return _final(lowered, order, final)


def greedy_nms(
    overlaps: Tensor, classes: Tensor, scores: Tensor, iou_threshold: float = 0.5, final: FinalScores = FinalScores()
) -> tuple[Tensor, Tensor]:
    """Removes every mask that overlaps a better one of its class that is kept; see `matrix_nms`.

    What is kept is the one fixed point of "kept, unless a kept better one overlaps": it is found by applying that to
    all masks at once, as often as the longest chain of suppressions has links.
    """
    suppresses = duplicate_overlaps(overlaps, classes) > iou_threshold
    kept, before = ~suppresses.any(0), torch.ones_like(classes, dtype=torch.bool)
    while not torch.equal(kept, before):
        kept, before = ~(suppresses & kept[:, None]).any(0), kept
    order = kept.nonzero().squeeze(1)
    return _final(scores[order], order, final)


def _final(scores: Tensor, order: Tensor, final: FinalScores) -> tuple[Tensor, Tensor]:
    if final.threshold > 0:
        enough = scores >= final.threshold
        scores, order = scores[enough], order[enough]
    return scores[: final.limit], order[: final.limit]
