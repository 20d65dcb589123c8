"""How alike the features of two networks are: over positions, whatever their channels; and what they have in common."""

import torch
from torch import Tensor

#: Channels whose deviation is below this share of their largest value are constant.
_CONSTANT = 1e-6
#: Added to the variance of each channel in `ridge_weights`, as a share of it.
RIDGE = 0.1


def standardize_channels(x: Tensor) -> Tensor:
    """Brings every channel to zero mean and unit variance over all positions; constant ones become zero.

    Args:
        x: (P, C), a row for each position.

    Returns:
        (P, C), whatever the scale of `x`.
    """
    centered = x - x.mean(0)
    deviation = centered.square().mean(0).sqrt()
    constant = deviation <= _CONSTANT * x.abs().amax(0).clamp(min=torch.finfo(x.dtype).tiny)
    return torch.where(constant, torch.zeros_like(x), centered / deviation.masked_fill(constant, 1))


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Returns the linear centered kernel alignment of two sets of features of the same positions, in [0, 1].

    ||Y'X||^2 / (||X'X|| ||Y'Y||) with centered X and Y (Kornblith et al., "Similarity of Neural Network Representations
    Revisited", ICML 2019, section 3). It does not see rotations of the channels, nor one scale of all. With fewer
    positions than channels it is high for anything. 0 where one of both is constant.

    Args:
        x: (P, C).
        y: (P, D).
    """
    x, y = x - x.mean(0), y - y.mean(0)
    if len(x) < max(x.shape[1], y.shape[1]):  # the same numbers, from the smaller matrices of positions
        kernel_x, kernel_y = x @ x.T, y @ y.T
        shared, norms = (kernel_x * kernel_y).sum(), kernel_x.norm() * kernel_y.norm()
    else:
        shared, norms = (y.T @ x).square().sum(), (x.T @ x).norm() * (y.T @ y).norm()
    return float(shared / norms) if norms > 0 else 0.0


def principal_axes(sets: list[Tensor], count: int = 3) -> tuple[Tensor, Tensor]:
    """Returns the directions in which centered features vary most, of several sets together, each counting alike.

    Args:
        sets: (P, C) each, centered.
        count: how many, at most.

    Returns:
        Unit vectors (C, K), K = min(count, C), the largest entry of each positive; and their shares of the variance
        (K,), which are 0 where nothing varies.
    """
    covariance = torch.stack([x.T @ x / len(x) for x in sets]).mean(0)
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0)[:count].clamp(min=0), vectors.flip(1)[:, :count]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    total = covariance.diagonal().sum()
    shares = values / total if total > 0 else torch.zeros_like(values)
    return vectors * torch.where(largest < 0, -1.0, 1.0), shares


def ridge_weights(x: Tensor, y: Tensor, ridge: float = RIDGE) -> Tensor:
    """Returns the linear map (C, D) from standardized features to others that has the least squared error.

    Minimizes ||x W - y||^2 / P + ridge ||W||^2 (Hoerl and Kennard, "Ridge Regression", 1970).

    Args:
        x: (P, C), standardized.
        y: (P, D), centered.
        ridge: weight of the penalty; above 0.
    """
    positions, channels = x.shape
    if positions < channels:
        kernel = x @ x.T + ridge * positions * torch.eye(positions, dtype=x.dtype, device=x.device)
        return x.T @ torch.linalg.solve(kernel, y)
    gram = x.T @ x + ridge * positions * torch.eye(channels, dtype=x.dtype, device=x.device)
    return torch.linalg.solve(gram, x.T @ y)
