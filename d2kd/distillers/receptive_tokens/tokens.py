"""Receptive tokens: masks from token vectors, their weights and diversity.

No tensor over the positions has both a token and a channel axis: masks are (N, T, H, W), the rest (N, C, H, W) at most.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from d2kd.layers import upcast_half


class Tokens(NamedTuple):
    """The learned tokens of one level.

    With a weighting branch, `weight` is (T, C, 3, 3) and `bias` (T,): its two convolutions, multiplied out.
    """

    tokens: Tensor  # (T, C)
    weight: Tensor | None = None
    bias: Tensor | None = None


def token_masks(x: Tensor, tokens: Tensor, bias: Tensor | None = None) -> Tensor:
    """Soft masks sigmoid(<token, pixel>) (Huang et al., "Masked Distillation with Receptive Tokens", 2023).

    Args:
        x: (N, C, H, W), any floating type.
        tokens: (T, C).
        bias: (T,), added to the products.

    Returns:
        (N, T, H, W) in float32 or more, each value in [0, 1].
    """
    x = upcast_half(x)
    n, _, h, w = x.shape
    with torch.autocast(x.device.type, enabled=False):
        e = tokens.to(x.dtype).expand(n, -1, -1)
        pixels = x.flatten(2)
        products = torch.bmm(e, pixels) if bias is None else torch.baddbmm(bias.to(x.dtype)[None, :, None], e, pixels)
    return products.sigmoid().view(n, -1, h, w)


def dice(masks: Tensor, eps: float = 1e-12) -> Tensor:
    """Mean overlap of the masks of a level, 0 to 1; minimised, so that tokens look at different things.

    The soft Dice coefficient 2<m_t, m_u> / (<m_t, m_t> + <m_u, m_u> + 2 eps), averaged over images and pairs t != u.

    Args:
        masks: (N, T, H, W) or (N, T, P).

    Returns:
        A scalar; 0 where there is one token only.
    """
    n, t = masks.shape[:2]
    with torch.autocast(masks.device.type, enabled=False):
        flat = masks.flatten(2)
        gram = torch.bmm(flat, flat.transpose(1, 2))
    squares = gram.diagonal(dim1=1, dim2=2) + eps
    overlap = 2.0 * gram / (squares[:, :, None] + squares[:, None, :])
    return overlap.triu(1).sum() * (2.0 / (n * max(t * (t - 1), 1)))


def shifted_means(x: Tensor) -> Tensor:
    """Means over all positions of a zero-padded map that is shifted by -1, 0 and 1 rows and columns.

    `conv(x).mean((2, 3))` of a 3x3 convolution with padding 1 is the product of its kernel with these means: so a
    convolution that is pooled at once need not be computed. A shifted sum is the total less a border row and column.

    Args:
        x: (N, C, H, W).

    Returns:
        (N, C, 3, 3) in float32 or more, in the order of a kernel's elements.
    """
    x = upcast_half(x)
    rows = x.sum(3)
    by_column = torch.stack([rows - x[..., -1], rows, rows - x[..., 0]], dim=3)
    total = by_column.sum(2)
    sums = torch.stack([total - by_column[:, :, -1], total, total - by_column[:, :, 0]], dim=2)
    return sums / (x.shape[2] * x.shape[3])


def token_weights(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Importance of each token for each image: softmax over the tokens of a linear map of the pooled features.

    Args:
        x: (N, C, H, W).
        weight: (T, C, 3, 3).
        bias: (T,).

    Returns:
        (N, T), each row of sum 1, in float32 or more.
    """
    means = shifted_means(x)
    with torch.autocast(x.device.type, enabled=False):
        logits = torch.addmm(bias.to(means.dtype), means.flatten(1), weight.to(means.dtype).flatten(1).t())
    return logits.softmax(dim=1)


class WeightingBranch(nn.Module):
    """conv3x3 -> mean over positions -> conv1x1 -> softmax, with nothing between them: a linear map up to the softmax.

    It learns as two layers, as published, and is computed as their product.
    """

    def __init__(self, channels: int, num_tokens: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.predictor = nn.Conv2d(channels, num_tokens, kernel_size=1)
        for layer in (self.conv, self.predictor):
            fan_out = layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1]
            nn.init.normal_(layer.weight, std=math.sqrt(2.0 / fan_out))
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def folded(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Weight (T, C, 3, 3) and bias (T,) of both layers' product, computed in `dtype`; differentiable."""
        assert self.conv.bias is not None and self.predictor.bias is not None
        dtype = dtype or self.conv.weight.dtype
        inner, outer = self.conv.weight.to(dtype), self.predictor.weight.to(dtype).flatten(1)
        with torch.autocast(outer.device.type, enabled=False):
            weight = (outer @ inner.flatten(1)).view(-1, *inner.shape[1:])
            return weight, outer @ self.conv.bias.to(dtype) + self.predictor.bias.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, T), each row of sum 1."""
        return token_weights(x, *self.folded())


class TokenMasks(nn.Module):
    """Learns the tokens of one level: replaces a map by its masked version (the first stage)."""

    def __init__(self, channels: int, num_tokens: int, weighting: bool = True) -> None:
        """
        Args:
            channels: of the map.
            num_tokens: the paper's T, 1 or more.
            weighting: learn a weight for each token and image; without, the masks are added up.
        """
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(num_tokens, channels).normal_(std=0.01))
        self.weighting = WeightingBranch(channels, num_tokens) if weighting else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The masked map (N, C, H, W), in the type of `x`, and the masks (N, T, H, W)."""
        masks = token_masks(x, self.tokens)
        return x * self.gate(x, masks)[:, None].to(x.dtype), masks

    def gate(self, x: Tensor, masks: Tensor) -> Tensor:
        """(N, H, W): the masks, weighted where there is a weighting branch, added up over the tokens."""
        return (masks if self.weighting is None else masks * self.weighting(x)[..., None, None]).sum(1)

    @torch.no_grad()
    def export(self) -> Tokens:
        """Returns what the second stage needs, on the CPU in float32."""
        folded = () if self.weighting is None else self.weighting.folded(torch.double)
        return Tokens(*(x.detach().float().cpu().clone() for x in (self.tokens, *folded)))
