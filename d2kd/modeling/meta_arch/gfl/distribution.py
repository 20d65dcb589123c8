"""Distances that are predicted as distributions over whole numbers of strides (arXiv 2006.04388, section 3)."""

import torch
from torch import Tensor

from d2kd.layers import upcast_half

#: Of a box.
SIDES = 4
#: How far distances that are learned stay below the largest one that can be told, in strides; as released.
MARGIN = 0.1


def expected_distances(logits: Tensor) -> Tensor:
    """Returns the mean of the distribution of each distance, in strides (equation 5).

    Args:
        logits: (..., B) of the distances 0 to B - 1.

    Returns:
        (...) in [0, B - 1].
    """
    steps = torch.arange(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    return (logits.softmax(dim=-1) * steps).sum(dim=-1)


def box_distances(logits: Tensor) -> Tensor:
    """Returns the distances to the sides of boxes, (..., 4) in strides, of (..., 4 * B) logits; in float32 at least."""
    return expected_distances(upcast_half(logits).unflatten(-1, (SIDES, -1)))


def as_box(distances: Tensor) -> Tensor:
    """Turns distances (..., 4) to left, top, right and bottom into boxes (..., 4) XYXY around the origin."""
    before, after = distances.split(2, dim=-1)
    return torch.cat([-before, after], dim=-1)


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """Cross entropy to the two whole numbers around a distance, by how near they are (equation 6).

    Args:
        logits: (..., B).
        distances: (...) in strides; limited to [0, B - 1 - `MARGIN`].

    Returns:
        (...), not reduced.
    """
    distances = distances.clamp(min=0, max=logits.shape[-1] - 1 - MARGIN)
    below = distances.floor()
    log_p = logits.log_softmax(dim=-1)
    index = below.long()[..., None]
    lower, upper = log_p.gather(-1, index)[..., 0], log_p.gather(-1, index + 1)[..., 0]
    return -(lower * (below + 1 - distances) + upper * (distances - below))
