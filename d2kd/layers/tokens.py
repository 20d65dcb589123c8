"""Tokens of vision transformers: how much a student attends to each patch, which ones are kept, and maps of these."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .align import rescale


def attention_saliency(query: Tensor, key: Tensor, scale: float, prefix: int) -> Tensor:
    """Returns how much a block attends to each patch, as the mean over its heads, without gradient and in float32.

    With a class token it is that token's row (arXiv 2302.10494, section 3.2), else the mean over the rows of all
    patches. The row is not normalized anew without the columns before the patches.

    Args:
        query, key: (N, heads, prefix + patches, channels a head).
        scale: of the scores, usually 1 / sqrt(channels a head).
        prefix: tokens before those of the patches, the class token first; may be 0.

    Returns:
        (N, patches), each in [0, 1].
    """
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        rows = query[:, :, :1] if prefix else query  # one row is all that is needed: the rest may stay fused
        attention = (rows.float() * scale) @ key.float().transpose(-2, -1)
        return attention.softmax(-1).mean((1, 2))[:, prefix:]


def resample_saliency(saliency: Tensor, ratio: float, grid: tuple[int, int]) -> Tensor:
    """Brings a saliency to another grid of patches that starts at the same corner of the image.

    Args:
        saliency: (N, H, W).
        ratio: its stride over that of the other grid.
        grid: rows and columns of the other grid.

    Returns:
        (N, rows, columns); 0 beyond the image that the saliency is of.
    """
    maps = rescale(saliency[:, None].float(), ratio)
    missing = [want - have for want, have in zip(grid, maps.shape[-2:])]
    return F.pad(maps, (0, missing[1], 0, missing[0]))[:, 0]  # negative ones crop


def ranks_of(scores: Tensor) -> Tensor:
    """Returns the rank of each score in its row, ascending and in (0, 1); equal ones rank by their places.

    Args:
        scores: (N, K).

    Returns:
        (N, K), multiples of 1 / (K + 1).
    """
    order = scores.argsort(dim=1, stable=True)
    ranks = torch.empty_like(scores)
    steps = torch.arange(1, scores.shape[1] + 1, device=scores.device, dtype=scores.dtype) / (scores.shape[1] + 1)
    return ranks.scatter_(1, order, steps.expand_as(scores))


def gather_tokens(tokens: Tensor, kept: Tensor, prefix: int) -> Tensor:
    """Returns the tokens before the patches, and the kept ones of these.

    Args:
        tokens: (N, prefix + patches, C).
        kept: (N, K), indices among the patches.
        prefix: tokens before those of the patches.

    Returns:
        (N, prefix + K, C).
    """
    places = (kept + prefix)[..., None].expand(-1, -1, tokens.shape[2])
    return torch.cat([tokens[:, :prefix], tokens.gather(1, places)], dim=1)


def scatter_tokens(tokens: Tensor, kept: Tensor, grid: tuple[int, int], prefix: int) -> tuple[Tensor, Tensor]:
    """Returns the map that kept tokens are of, and where it is known.

    Args:
        tokens: (N, prefix + K, C).
        kept: (N, K), indices among the patches of the grid.
        grid: H and W.
        prefix: tokens before those of the patches.

    Returns:
        (N, C, H, W), 0 where nothing was kept, and (N, H, W) bool.
    """
    patches = tokens[:, prefix:]
    n, k, channels = patches.shape
    maps = tokens.new_zeros(n, grid[0] * grid[1], channels)
    maps.scatter_(1, kept[..., None].expand(-1, -1, channels), patches)
    valid = torch.zeros(n, grid[0] * grid[1], dtype=torch.bool, device=tokens.device).scatter_(1, kept, True)
    return maps.transpose(1, 2).unflatten(2, grid), valid.unflatten(1, grid)
