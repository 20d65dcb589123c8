"""Squared error of two feature maps."""

import torch.nn.functional as F
from torch import Tensor

from .precision import upcast_half

#: Values of REDUCTION, in every method that has the key.
REDUCTIONS = ("batchmean", "mean")


def squared_error(prediction: Tensor, target: Tensor, reduction: str, valid: Tensor | None = None) -> Tensor:
    """Returns the squared error of two maps, accumulated in float32 or more.

    Args:
        prediction: (N, C, H, W).
        target: (N, C, H, W), takes no gradient.
        reduction: "batchmean" sums over channels and positions and divides by the N images of this process
            (Yang et al., "Masked Generative Distillation", 2022, eq. 3), so its scale grows with C*H*W;
            "mean" is the mean over all elements.
        valid: (N, H, W), True where the target is known; the mean is then over these positions, and "batchmean" is
            that mean times C*H*W, so that the loss has the same scale however many positions there are.

    Returns:
        A scalar; 0, and connected to the prediction, where no position is valid.

    Raises:
        ValueError: unknown reduction.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}.")
    prediction, target = upcast_half(prediction), upcast_half(target)
    n, c, h, w = prediction.shape
    if valid is not None:
        squares = (prediction - target).square().sum(1)
        total = squares.where(valid, 0).sum() / (c * valid.sum().clamp(min=1))
        return total * (c * h * w) if reduction == "batchmean" else total
    if reduction == "batchmean":
        return F.mse_loss(prediction, target, reduction="sum") / n
    return F.mse_loss(prediction, target)
