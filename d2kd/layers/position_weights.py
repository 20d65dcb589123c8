"""Weights of the positions of a map, by masks or by the boxes of objects, and the squared error under them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .losses import CenteredMap, upcast_half


def _not_zero(x: Tensor) -> Tensor:
    return x.clamp(min=torch.finfo(x.dtype).tiny)


def mask_weights(masks: Tensor, weights: Tensor, eps: float, mean: bool = False) -> Tensor:
    """The weight of every position in the masked distance, all tokens together.

    A[n, p] = sum_t w[n, t] m[n, t, p]^2 / (sum_p' m[n, t, p'] + eps).

    Args:
        masks: (N, T, H, W).
        weights: (N, T) of the tokens.
        eps: at least 0. A mask that is zero everywhere weighs nothing, also with 0.
        mean: scale the weights of each image to the sum 1, which makes the masked distance a weighted mean.

    Returns:
        (N, H, W).
    """
    flat = masks.flatten(2)
    squares = flat.square()
    with torch.autocast(masks.device.type, enabled=False):
        of_positions = torch.bmm((weights / _not_zero(flat.sum(2) + eps))[:, None], squares)
    if mean:
        of_positions = of_positions / _not_zero(of_positions.sum(2, keepdim=True) + eps)
    return of_positions.view(masks.shape[0], *masks.shape[2:])


def weighted_error(student: Tensor, teacher: Tensor, position_weights: Tensor) -> Tensor:
    """1/N sum_{n,p} A[n, p] mean_c (s - t)^2, accumulated in float32 or more.

    The backward pass computes s - t anew, so nothing of the size of a map is kept for it.

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W), takes no gradient.
        position_weights: (N, H, W), takes no gradient.

    Returns:
        A scalar.
    """
    return _WeightedError.apply(upcast_half(student), upcast_half(teacher.detach()), position_weights.detach())


class _WeightedError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, position_weights: Tensor) -> Tensor:
        ctx.save_for_backward(student, teacher, position_weights)
        n, c = student.shape[:2]
        distances = (student - teacher).square_().sum(1)
        return (distances * position_weights).sum() / (n * c)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        student, teacher, position_weights = ctx.saved_tensors
        n, c = student.shape[:2]
        return (student - teacher).mul_((position_weights * (2.0 * grad / (n * c)))[:, None]), None, None


def weighted_standardized_error(
    student: Tensor, centered: CenteredMap, teacher: CenteredMap, position_weights: Tensor
) -> Tensor:
    """1/N sum_{n,p} A[n, p] mean_c (s - t)^2 of standardized maps, its gradient computed at once.

    With g the gradient for the standardized map, that for the student is (g - mean(g) - s mean(g s)) / deviation, means
    over the batch and all positions, channel by channel: one map is kept for the backward pass.

    Args:
        student: (N, C, H, W), which takes the gradient.
        centered: `center(student)`; its map is overwritten.
        teacher: `center` of the teacher's map (N, C, H, W); its map is overwritten too.
        position_weights: (N, H, W), A; takes no gradient.

    Returns:
        A scalar. Its gradient cannot be differentiated again.
    """
    error: Tensor = _WeightedStandardizedError.apply(
        upcast_half(student), centered.map, centered.inverse, teacher.map, teacher.inverse, position_weights
    )
    return error


class _WeightedStandardizedError(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, s: Tensor, inverse: Tensor, t: Tensor, teacher_inverse: Tensor, weights: Tensor
    ) -> Tensor:
        s, t = s.mul_(inverse[:, None, None]), t.mul_(teacher_inverse[:, None, None])
        difference = torch.sub(s, t, out=t)
        weighted = difference * weights[:, None]
        images, channels = s.shape[:2]
        error = (difference.mul_(weighted)).sum() / (images * channels)
        if ctx.needs_input_grad[0]:
            scale = 2 / (images * channels)
            mean = weighted.mean((0, 2, 3), keepdim=True)
            along = torch.mul(weighted, s, out=difference).mean((0, 2, 3), keepdim=True)
            gradient = weighted.sub_(mean).addcmul_(s, along, value=-1).mul_(inverse[:, None, None] * scale)
            ctx.save_for_backward(gradient)
        return error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (of_student,) = ctx.saved_tensors
        return of_student * gradient, None, None, None, None, None


@torch.no_grad()
def object_weights(
    boxes: Sequence[Tensor], size: tuple[int, int], stride: float, share: float, valid: Tensor | None = None
) -> Tensor:
    """The weight of every position by the objects there: the masks of "FGD" (Yang et al., arXiv 2111.11837, 3.1).

    Each object has the same weight, over all cells that its box touches, and all cells of no object have the rest. One
    whose box touches none does not count.
    Where boxes overlap their weights add up (the paper takes that of the smallest). An image has the sum 1: without
    objects, or without background, all of it goes to the other.

    Args:
        boxes: (M, 4) XYXY of each of N images, in pixels; M may be 0.
        size: H and W.
        stride: pixels a cell.
        share: that all objects of an image have together, in [0, 1].
        valid: (N, H, W) bool, the positions that count; None is all.

    Returns:
        (N, H, W) in float32; zeros for an image without valid positions.
    """
    weights = []
    for i, of_image in enumerate(boxes):
        x0, y0, x1, y1 = (of_image.float() / stride).unbind(1)
        columns, rows = (torch.arange(n, device=of_image.device) for n in (size[1], size[0]))
        across = (columns + 1 > x0[:, None]) & (columns < x1[:, None])
        down = (rows + 1 > y0[:, None]) & (rows < y1[:, None])
        inside = down[:, :, None] & across[:, None, :]
        masks = torch.cat([inside, ~inside.any(0, keepdim=True)]).float()[None]
        if valid is not None:
            masks = masks * valid[i]
        there = masks[0, :-1].flatten(1).any(1)  # a box without area, or outside of the map, touches no cell
        each = (share / there.sum().clamp(min=1)).expand(1, len(masks[0])).clone()
        each[:, -1] = torch.where(there.any(), 1 - share, 1.0)
        weights.append(mask_weights(masks, each, 0.0, mean=True))
    return torch.cat(weights)
