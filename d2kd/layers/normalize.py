"""Feature standardization: makes a feature loss independent of the scale of the maps it compares."""

import torch
from torch import Tensor

from .precision import upcast_half

#: Values of NORMALIZE, in every method that has the key.
NORMALIZATIONS = ("none", "standardize")
#: Added to a channel's variance.
EPS = 1e-6


def standardize(x: Tensor, valid: Tensor | None = None) -> Tensor:
    """Brings every channel to zero mean and unit variance over the batch and all (valid) positions.

    The mean squared difference of two standardized maps is 2 - 2r, r their Pearson correlation (Cao et al., "PKD",
    NeurIPS 2022, eq. 4): it does not see scale and offset of a channel, so one loss weight fits all models.

    Args:
        x: (N, C, H, W), any floating type.
        valid: (N, H, W), True at the positions that count; None is everywhere.

    Returns:
        (N, C, H, W) in float32 or more; constant channels become zero. The gradient flows through the statistics.
    """
    x = upcast_half(x)
    mean, variance = (statistic[:, None, None] for statistic in channel_statistics(x, valid))
    # sqrt has an infinite slope at 0: a channel that is constant (a 1x1 map of one image) would give NaN gradients
    return (x - mean) * torch.rsqrt(variance + EPS)


def channel_statistics(x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns mean and (biased) variance of every channel over batch and (valid) positions, (C,) each.

    Args:
        x: (N, C, H, W).
        valid: (N, H, W), True at the positions that count; None is everywhere.
    """
    if valid is None:
        variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        return mean, variance
    weights = valid[:, None].to(x.dtype) / valid.sum().clamp(min=1)
    mean = (x * weights).sum((0, 2, 3))
    return mean, ((x - mean[:, None, None]).square() * weights).sum((0, 2, 3))


def normalize(x: Tensor, mode: str, valid: Tensor | None = None) -> Tensor:
    """Applies a value of NORMALIZE, "none" or "standardize".

    Raises:
        ValueError: unknown mode.
    """
    if mode not in NORMALIZATIONS:
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(NORMALIZATIONS)}.")
    return standardize(x, valid) if mode == "standardize" else x
