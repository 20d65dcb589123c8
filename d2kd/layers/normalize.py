"""Feature standardisation: makes a feature loss independent of the scale of the maps it compares."""

import torch
from torch import Tensor

from .losses import at_least_float32

MODES = ("none", "standardize")


def standardize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Brings every channel to zero mean and unit variance over the batch and all positions.

    The mean squared difference of two standardised maps is 2 - 2r, r their Pearson correlation (Cao et al., "PKD",
    NeurIPS 2022, eq. 4): it does not see scale and offset of a channel, so one loss weight fits all models.

    Args:
        x: (N, C, H, W), any floating type.
        eps: added to the standard deviation; constant channels become zero.

    Returns:
        (N, C, H, W) in float32 or more; the gradient flows through the statistics.
    """
    x = at_least_float32(x)
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), keepdim=True, correction=0)
    # sqrt has an infinite slope at 0: a channel that is constant (a 1x1 map of one image) would give NaN gradients
    return (x - mean) * torch.rsqrt(variance + eps)


def normalize(x: Tensor, mode: str) -> Tensor:
    """Applies a `NORMALIZE` mode of the configuration: "none" or "standardize".

    Raises:
        ValueError: the mode is unknown.
    """
    check_mode(mode)
    return standardize(x) if mode == "standardize" else x


def check_mode(mode: str) -> None:
    """Raises ValueError unless `mode` is a known normalisation."""
    if mode not in MODES:
        raise ValueError(f"NORMALIZE is {mode!r}; it must be one of {', '.join(MODES)}.")
