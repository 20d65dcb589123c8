"""Squared-error reductions shared by the distillers."""

import torch
import torch.nn.functional as F
from torch import Tensor

REDUCTIONS = ("paper", "mean")


def check_reduction(reduction: str) -> None:
    """Raises ValueError unless `reduction` is known."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"REDUCTION is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}.")


def at_least_float32(x: Tensor) -> Tensor:
    """float32 for half-precision types, else the tensor itself: sums over millions of elements need the digits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def squared_error(prediction: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Squared error of two maps, accumulated in float32 or more.

    Args:
        prediction: (N, C, H, W).
        target: (N, C, H, W), takes no gradient.
        reduction: "paper" sums over channels and positions and divides by the N images of this process
            (Yang et al., "Masked Generative Distillation", eq. 3), so its scale grows with C*H*W;
            "mean" is the mean over all elements.

    Returns:
        A scalar.
    """
    check_reduction(reduction)
    sum_up = reduction == "paper"
    total = F.mse_loss(at_least_float32(prediction), at_least_float32(target), reduction="sum" if sum_up else "mean")
    return total / prediction.shape[0] if sum_up else total
