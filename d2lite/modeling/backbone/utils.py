"""Windows, relative positions and patch embedding of plain vision transformers (arXiv 2203.16527)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Cuts an image into patches and embeds each one linearly, as a convolution whose stride is its size."""

    def __init__(
        self,
        kernel_size: tuple[int, int] = (16, 16),
        stride: tuple[int, int] = (16, 16),
        padding: tuple[int, int] = (0, 0),
        in_chans: int = 3,
        embed_dim: int = 768,
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=kernel_size, stride=stride, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, H / stride, W / stride, embed_dim)."""
        return self.proj(x).permute(0, 2, 3, 1)


def window_partition(x: Tensor, window_size: int) -> tuple[Tensor, tuple[int, int]]:
    """Cuts (B, H, W, C) into square windows, after padding with zeros at the right and at the bottom.

    Returns:
        (B * windows, window_size, window_size, C), and the padded (H, W).
    """
    b, h, w, c = x.shape
    pad_h, pad_w = -h % window_size, -w % window_size
    if pad_h or pad_w:
        x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
    rows, columns = (h + pad_h) // window_size, (w + pad_w) // window_size
    x = x.view(b, rows, window_size, columns, window_size, c).transpose(2, 3)
    return x.reshape(-1, window_size, window_size, c), (h + pad_h, w + pad_w)


def window_unpartition(windows: Tensor, window_size: int, pad_hw: tuple[int, int], hw: tuple[int, int]) -> Tensor:
    """Undoes `window_partition`: (B * windows, window_size, window_size, C) -> (B, H, W, C).

    Args:
        windows: the windows.
        window_size: their side.
        pad_hw: padded (H, W).
        hw: (H, W) without padding.
    """
    rows, columns = pad_hw[0] // window_size, pad_hw[1] // window_size
    x = windows.view(-1, rows, columns, window_size, window_size, windows.shape[-1]).transpose(2, 3)
    return x.reshape(-1, *pad_hw, windows.shape[-1])[:, : hw[0], : hw[1]].contiguous()


def get_rel_pos(q_size: int, k_size: int, rel_pos: Tensor) -> Tensor:
    """Embeddings of the relative positions of all pairs of query and key along one axis.

    Args:
        q_size, k_size: number of positions of the queries and of the keys.
        rel_pos: (L, C) table; resized linearly to 2 * max(q_size, k_size) - 1 rows if it has another length.

    Returns:
        (q_size, k_size, C).
    """
    length = 2 * max(q_size, k_size) - 1
    if rel_pos.shape[0] != length:
        rel_pos = F.interpolate(rel_pos.T[None], size=length, mode="linear")[0].T
    # Where one side is coarser than the other, its steps are longer.
    q_step, k_step = max(k_size / q_size, 1.0), max(q_size / k_size, 1.0)
    q = torch.arange(q_size, device=rel_pos.device)[:, None] * q_step
    k = torch.arange(k_size, device=rel_pos.device)[None, :] * k_step
    return rel_pos[(q - k + (k_size - 1) * k_step).long()]


def decomposed_rel_pos(
    q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, q_size: tuple[int, int], k_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Relative position terms of the attention logits, split into rows and columns (arXiv 2112.01526, eq. 4).

    Args:
        q: (B, q_h * q_w, C) queries, not scaled.
        rel_pos_h, rel_pos_w: tables as for `get_rel_pos`.
        q_size, k_size: (height, width) of the grids of the queries and of the keys.

    Returns:
        (B, q_h, q_w, k_h) and (B, q_h, q_w, k_w); the logit of query (i, j) and key (k, l) gets their
        elements [i, j, k] and [i, j, l].
    """
    q = q.reshape(q.shape[0], *q_size, q.shape[-1])
    rows = get_rel_pos(q_size[0], k_size[0], rel_pos_h)
    columns = get_rel_pos(q_size[1], k_size[1], rel_pos_w)
    rel_h = torch.einsum("bhwc,hkc->bhwk", q, rows)
    rel_w = torch.einsum("bhwc,wkc->bhwk", q, columns)
    # einsum leaves permuted strides, which the far larger sum of the two would inherit.
    return rel_h.contiguous(), rel_w.contiguous()


def add_decomposed_rel_pos(
    attn: Tensor,
    q: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    q_size: tuple[int, int],
    k_size: tuple[int, int],
) -> Tensor:
    """Adds the terms of `decomposed_rel_pos` to logits `attn` (B, q_h * q_w, k_h * k_w)."""
    rel_h, rel_w = decomposed_rel_pos(q, rel_pos_h, rel_pos_w, q_size, k_size)
    grid = attn.view(attn.shape[0], *q_size, *k_size) + rel_h[..., :, None] + rel_w[..., None, :]
    return grid.view_as(attn)


def get_abs_pos(abs_pos: Tensor, has_cls_token: bool, hw: tuple[int, int]) -> Tensor:
    """Absolute position embeddings on a grid of another size, by bicubic interpolation.

    Args:
        abs_pos: (1, S * S, C), or (1, 1 + S * S, C) with a class token first, which is dropped.
        has_cls_token: whether there is that token.
        hw: (H, W) of the grid wanted.

    Returns:
        (1, H, W, C).
    """
    if has_cls_token:
        abs_pos = abs_pos[:, 1:]
    size = int(abs_pos.shape[1] ** 0.5)
    if size * size != abs_pos.shape[1]:
        raise AssertionError(f"the position table has {abs_pos.shape[1]} rows, which is not a square grid")
    grid = abs_pos.view(1, size, size, -1)
    if (size, size) == tuple(hw):
        return grid
    grid = F.interpolate(grid.permute(0, 3, 1, 2), size=tuple(hw), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1)
