"""The focal loss of independent classes, in the precision of its input and without NaN for any exponent."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .losses import upcast_half


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
