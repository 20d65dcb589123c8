"""Squared-error reductions shared by the distillers."""

import torch
from torch import Tensor

REDUCTIONS = ("paper", "mean")


def check_reduction(reduction: str) -> None:
    """Raises ValueError unless `reduction` is known."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"REDUCTION is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}.")


def squared_error(prediction: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Squared error of two maps, accumulated in float32.

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
    total = torch.nn.functional.mse_loss(prediction.float(), target.float(), reduction="sum" if reduction == "paper" else "mean")
    return total / prediction.shape[0] if reduction == "paper" else total
