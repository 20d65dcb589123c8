"""A plain vision transformer of ViTDet on some of its patches, exactly: as if all others were hidden from attention."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kd.errors import ConfigError
from detectron2.modeling.backbone.utils import get_abs_pos, get_rel_pos

#: Groups of windows of similar occupancy, each padded to its fullest; one alone would waste what dropping saves.
MAX_GROUPS = 4


class Windows(NamedTuple):
    """Windows that are computed together, each with up to L kept patches and up to P cells of padding.

    The padding of ViTDet is not hidden from attention: its cells are keys whose tokens are zero.
    """

    #: (W, L) places among all kept patches of the batch; 0 where there are fewer.
    places: Tensor
    #: (W, L) whether there is a patch.
    filled: Tensor
    #: (T,) indices into W * L of those that there are: a mask as index would make the host wait in every block.
    tokens: Tensor
    #: (W, L + P, 2) row and column within the window, of the patches and of the cells of padding.
    positions: Tensor
    #: (W, L + P) whether there is a key.
    keys: Tensor


class SparseViT:
    """Runs Detectron2's `ViT` on kept patches.

    All patches are embedded and get their positions; the others are dropped before the first block. Windows and
    relative positions are those of the places in the whole image, and the padding of windows keeps its part. With all
    patches it gives what the network gives.
    """

    def __init__(self, network: Any) -> None:
        """
        Args:
            network: Detectron2's `ViT`.

        Raises:
            ConfigError: it has convolutional blocks, which need whole maps.
        """
        if any(getattr(block, "use_residual_block", False) for block in network.blocks):
            raise ConfigError(
                "TEACHER_PASS MaskedTeacher cannot drop patches of a transformer with convolutional blocks "
                "(MODEL.VIT.RESIDUAL_BLOCK_INDEXES of the teacher): set it to auto."
            )
        self.network = network
        #: blocks that see all patches, before the others are dropped
        self.dense_blocks = 0

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Returns how many patches padded images (N, 3, H, W) have, (rows, columns)."""
        side = self.network.patch_embed.proj.stride
        return images.shape[-2] // side[0], images.shape[-1] // side[1]

    def __call__(self, images: Tensor, kept: Tensor) -> Tensor:
        """
        Args:
            images: (N, 3, H, W), normalized and padded.
            kept: (N, K) indices of patches, row by row, ascending.

        Returns:
            (N, K, C), the tokens behind the last block.
        """
        tokens = self.network.patch_embed(images)
        grid = (tokens.shape[1], tokens.shape[2])
        if self.network.pos_embed is not None:
            tokens = tokens + get_abs_pos(self.network.pos_embed, self.network.pretrain_use_cls_token, grid)
        for block in self.network.blocks[: self.dense_blocks]:
            tokens = block(tokens)
        tokens = tokens.flatten(1, 2)
        x = tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))
        places = torch.stack([kept // grid[1], kept % grid[1]], dim=-1)
        groups: dict[int, list[Windows]] = {}
        for block in self.network.blocks[self.dense_blocks :]:
            size = block.window_size
            if size and size not in groups:
                groups[size] = group_windows(places, grid, size)
            normed = block.norm1(x)
            attended = (
                _attend_windows(block.attn, normed, groups[size], size)
                if size
                else _attend_all(block.attn, normed, places, grid)
            )
            x = x + attended
            x = x + block.mlp(block.norm2(x))
        return x


def group_windows(places: Tensor, grid: tuple[int, int], size: int) -> list[Windows]:
    """Sorts kept patches into windows, and these into groups of similar occupancy.

    Args:
        places: (N, K, 2) row and column of each kept patch.
        grid: rows and columns of all patches.
        size: side of the windows in patches.
    """
    n, k, _ = places.shape
    columns, rows = -(-grid[1] // size), -(-grid[0] // size)
    image = torch.arange(n, device=places.device)[:, None] * (rows * columns)
    window = (image + places[..., 0] // size * columns + places[..., 1] // size).flatten()
    order = window.argsort(stable=True)
    numbers, counts = window[order].unique_consecutive(return_counts=True)
    starts = counts.cumsum(0) - counts
    groups = []
    for members in _by_occupancy(counts, _padding_cells(numbers % (rows * columns), grid, size, columns)):
        groups.append(_group(members, numbers, counts, starts, order, places, grid, size, columns))
    return groups


def _padding_cells(windows: Tensor, grid: tuple[int, int], size: int, columns: int) -> Tensor:
    """How many cells of each window (its number within an image) lie outside the grid."""
    height = (grid[0] - windows // columns * size).clamp(max=size)
    width = (grid[1] - windows % columns * size).clamp(max=size)
    return size * size - height * width


def _by_occupancy(counts: Tensor, padding: Tensor) -> list[Tensor]:
    """Indices of windows, in at most `MAX_GROUPS` groups of few padded places; those with padding apart."""
    groups: list[Tensor] = []
    for has_padding, number in ((padding == 0, MAX_GROUPS), (padding > 0, 2)):
        (members,) = has_padding.nonzero(as_tuple=True)
        if len(members):
            members = members[counts[members].argsort()]
            groups += [members[a:b] for a, b in _cuts(counts[members].tolist(), number)]
    return groups


def _cuts(sizes: Sequence[int], number: int) -> list[tuple[int, int]]:
    """The cuts of an ascending list into up to `number` groups with the least places, each padded to its largest."""
    ends = [i + 1 for i in range(len(sizes)) if i + 1 == len(sizes) or sizes[i] != sizes[i + 1]]
    best: dict[int, tuple[int, list[tuple[int, int]]]] = {0: (0, [])}
    for _ in range(number):
        fresh = dict(best)
        for start, (cost, cuts) in best.items():
            for end in ends:
                if end > start:
                    total = cost + (end - start) * sizes[end - 1]
                    if end not in fresh or total < fresh[end][0]:
                        fresh[end] = (total, [*cuts, (start, end)])
        best = fresh
    return best[len(sizes)][1]


def _group(
    members: Tensor,
    numbers: Tensor,
    counts: Tensor,
    starts: Tensor,
    order: Tensor,
    places: Tensor,
    grid: tuple[int, int],
    size: int,
    columns: int,
) -> Windows:
    length = int(counts[members].max())
    step = torch.arange(length, device=order.device)
    filled = step < counts[members][:, None]
    found = order[(starts[members][:, None] + step).where(filled, 0)].where(filled, 0)
    positions = places.flatten(0, 1)[found] % size
    rows = -(-grid[0] // size)
    window = numbers[members] % (rows * columns)
    # cells of the window that lie outside the grid
    cell = torch.arange(size * size, device=order.device)
    inside = torch.stack([cell // size, cell % size], dim=-1)
    y = (window // columns * size)[:, None] + inside[:, 0]
    x = (window % columns * size)[:, None] + inside[:, 1]
    outside = (y >= grid[0]) | (x >= grid[1])
    (used,) = outside.any(0).nonzero(as_tuple=True)  # the same cells of many windows, mostly
    padded = inside[used].expand(len(members), -1, -1)
    keys = torch.cat([filled, outside[:, used]], dim=1)
    return Windows(found, filled, filled.flatten().nonzero().squeeze(1), torch.cat([positions, padded], dim=1), keys)


def _heads(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of tokens (..., C), each (..., heads, C / heads)."""
    qkv = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1))
    return qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]


def _attend_all(attention: Any, x: Tensor, places: Tensor, grid: tuple[int, int]) -> Tensor:
    """Attention among all kept patches of an image."""
    q, k, v = (part.transpose(1, 2) for part in _heads(attention, x))
    bias = position_bias(attention, q, places, places, grid) if attention.use_rel_pos else None
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return attention.proj(out.transpose(1, 2).flatten(2))


def _attend_windows(attention: Any, x: Tensor, groups: Sequence[Windows], size: int) -> Tensor:
    """Attention within the windows, whose padding has the keys and values of zero tokens."""
    q, k, v = (part.flatten(0, 1) for part in _heads(attention, x))
    _, zero_k, zero_v = _heads(attention, x.new_zeros(1, x.shape[2]))
    out = torch.zeros_like(q)
    for group in groups:
        length, padding = group.places.shape[1], group.keys.shape[1] - group.places.shape[1]
        query = q[group.places].transpose(1, 2)
        keys, values = (
            torch.cat([part[group.places], zero.expand(len(query), padding, *zero.shape[1:])], dim=1).transpose(1, 2)
            for part, zero in ((k, zero_k), (v, zero_v))
        )
        bias = torch.zeros((), device=x.device, dtype=query.dtype)
        if attention.use_rel_pos:
            mine = group.positions[:, :length]
            bias = position_bias(attention, query, mine, group.positions, (size, size))
        bias = bias.masked_fill(~group.keys[:, None, None], float("-inf"))
        found = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias.to(query.dtype))
        out[group.places.flatten()[group.tokens]] = found.transpose(1, 2).flatten(0, 1)[group.tokens].to(out.dtype)
    return attention.proj(out.flatten(1)).view(x.shape)


def position_bias(attention: Any, query: Tensor, places: Tensor, of_keys: Tensor, grid: tuple[int, int]) -> Tensor:
    """Relative position terms of the logits, by the true places: queries as they are, not scaled.

    Args:
        attention: has the tables.
        query: (B, heads, L, C).
        places: (B, L, 2) row and column of each query.
        of_keys: (B, M, 2) of each key.
        grid: rows and columns that these may have.

    Returns:
        (B, heads, L, M).
    """
    terms = []
    for axis, table in enumerate((attention.rel_pos_h, attention.rel_pos_w)):
        embedded = get_rel_pos(grid[axis], grid[axis], table)[places[..., axis]]  # (B, L, size, C)
        by_line = torch.einsum("bhlc,blsc->bhls", query, embedded.to(query.dtype))
        lines = of_keys[:, None, None, :, axis].expand(*by_line.shape[:3], -1)
        terms.append(by_line.gather(3, lines))
    return terms[0] + terms[1]


def vit_of(model: nn.Module) -> Any | None:
    """Returns Detectron2's plain vision transformer in a model; None without."""
    from detectron2.modeling.backbone.vit import ViT

    return next((module for module in model.modules() if isinstance(module, ViT)), None)
