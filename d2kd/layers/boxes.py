"""Overlap of boxes, pair by pair."""

import torch
from torch import Tensor

from .losses import upcast_half


def generalized_iou(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
    """Returns the generalized IoU of pairs of boxes (Rezatofighi et al., arXiv 1902.09630, algorithm 1), in (-1, 1].

    Args:
        a: (M, 4) XYXY, x1 >= x0 and y1 >= y0.
        b: the same shape.
        eps: added to what is divided by, so that boxes without area give 0 and no NaN.

    Returns:
        (M,), in float32 at least.
    """
    a, b = upcast_half(a), upcast_half(b)
    inner = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    outer = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - inner
    return inner / (union + eps) - (outer - union) / (outer + eps)
