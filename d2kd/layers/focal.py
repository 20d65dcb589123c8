"""Focal losses of classes, in the precision of their input and without NaN for any exponent."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .losses import upcast_half
from .softplus import softplus

#: Differences of probabilities count as this where their power is below 1.
_NEAR = 1e-12


def sigmoid_focal_loss(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """Returns the focal loss of every class (Lin et al., arXiv 1708.02002, equation 5), not reduced.

    Args:
        logits: (..., K), any floating type.
        labels: (...) int64 in [0, K]; K is background, which is none of the classes.
        alpha: weight of the labelled class, with 1 - alpha for the others; negative weighs all alike.
        gamma: focusing exponent, 0 or more.

    Returns:
        (..., K) in float32, or float64 for such logits.
    """
    logits = upcast_half(logits)
    is_class = labels[..., None] == torch.arange(logits.shape[-1], device=labels.device)
    right = torch.where(is_class, logits, -logits)
    log_p = F.logsigmoid(right)
    # log(1 - p) = log p - right: a power of 1 - p itself would have an infinite slope at 0 for gamma below 1
    loss = -log_p * (gamma * (log_p - right)).exp()
    if alpha < 0:
        return loss
    return torch.where(is_class, alpha * loss, (1 - alpha) * loss)


def soft_label_focal_loss(logits: Tensor, target: Tensor, power: float, softmax: bool = False) -> Tensor:
    """Cross entropy to probabilities, weighted by how far they are, to a power; summed.

    With independent classes sum |p - t|^power (-t log p - (1 - t) log(1 - p)) (arXiv 2006.04388, equation 2); with a
    softmax over the classes sum (sum_k |p_k - t_k| / 2)^power (-sum_k t_k log p_k).

    Args:
        logits: of p, (N, K, H, W) or (R, K).
        target: t, the same shape; takes no gradient.
        power: 0 or more.
        softmax: whether the classes exclude each other.

    Returns:
        A scalar, in float32 at least.
    """
    logits, target = upcast_half(logits), upcast_half(target)
    if not softmax:
        loss: Tensor = _BinaryLoss.apply(logits, target, power)
        return loss
    loss = -(target * logits.log_softmax(1)).sum(1)
    if power:  # the clamp keeps the slope of powers below 1 finite
        loss = loss * ((logits.softmax(1) - target).abs().sum(1) / 2).clamp(min=_NEAR).pow(power)
    return loss.sum()


class _BinaryLoss(torch.autograd.Function):
    """The loss of independent classes, its gradient computed at once: one map is kept for the backward pass.

    With d = p - t and the cross entropy h the slope is POWER |d|^(POWER - 1) sign(d) p (1 - p) h + |d|^POWER d.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, power: float) -> Tensor:
        p = logits.sigmoid()
        entropy = softplus(logits).addcmul_(target, logits, value=-1)
        difference = p - target
        far = difference.abs()
        weight = far if power == 1 else far.pow(power)
        if ctx.needs_input_grad[0]:
            gradient = weight * difference
            if power:
                slope = difference.sign()
                slope = slope if power == 1 else slope.mul_(power * far.clamp(min=_NEAR).pow_(power - 1))
                gradient.addcmul_(slope.mul_(entropy), p.addcmul_(p, p, value=-1))
            ctx.save_for_backward(gradient)
        return (weight * entropy).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        (of_logits,) = ctx.saved_tensors
        return of_logits * gradient, None, None
