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
        (M,), in float32 at least. Boxes without area have 0 with themselves too.
    """
    inner, union, outer = _areas(a, b)
    return inner / (union + eps) - (outer - union) / (outer + eps)


def paired_iou(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
    """Returns the IoU of pairs of boxes, in [0, 1]; arguments and precision as for `generalized_iou`."""
    inner, union, _ = _areas(a, b)
    return inner / (union + eps)


def _areas(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of what pairs of boxes share, of both together, and of the smallest box around them; (M,) each."""
    # by coordinate: products along the short axis, and slices of it, are slow
    ax0, ay0, ax1, ay1 = upcast_half(a).t().contiguous()
    bx0, by0, bx1, by1 = upcast_half(b).t().contiguous()
    width = torch.minimum(ax1, bx1) - torch.maximum(ax0, bx0)
    height = torch.minimum(ay1, by1) - torch.maximum(ay0, by0)
    inner = width.clamp(min=0) * height.clamp(min=0)
    outer = (torch.maximum(ax1, bx1) - torch.minimum(ax0, bx0)) * (torch.maximum(ay1, by1) - torch.minimum(ay0, by0))
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - inner
    return inner, union, outer
