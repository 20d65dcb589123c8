"""Plain vision transformer with windowed and global attention for detection (ViTDet, arXiv 2203.16527)."""

import re
from collections.abc import Callable, Sequence

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from d2lite.layers import CNNBlockBase, Conv2d, get_norm
from d2lite.layers.batch_norm import Norm
from d2lite.modeling.backbone.backbone import Backbone
from d2lite.modeling.backbone.simple_feature_pyramid import SimpleFeaturePyramid
from d2lite.modeling.backbone.utils import (
    PatchEmbed,
    decomposed_rel_pos,
    get_abs_pos,
    window_partition,
    window_unpartition,
)

__all__ = ["SimpleFeaturePyramid", "ViT", "get_vit_lr_decay_rate"]


class ViT(Backbone):
    """Plain vision transformer: patches, transformer blocks with window or global attention, one feature map.

    Args:
        img_size: side of the nominal input in pixels; sets the size of the relative position tables.
        patch_size: side of a patch, and the stride of the feature map.
        in_chans: channels of the image.
        embed_dim: channels of the tokens.
        depth: number of blocks.
        num_heads: attention heads per block.
        mlp_ratio: hidden channels of the MLPs / `embed_dim`.
        qkv_bias: whether queries, keys and values have a bias.
        drop_path_rate: rate of stochastic depth in the last block; it grows linearly from 0.
        norm_layer: makes a norm for a number of channels.
        act_layer: makes an activation.
        use_abs_pos: learned absolute positions.
        use_rel_pos: learned decomposed relative positions in every block.
        rel_pos_zero_init: they start at zero.
        window_size: side of the windows in patches.
        window_block_indexes: blocks with window attention; the others are global.
        residual_block_indexes: blocks followed by a convolutional residual block.
        use_act_checkpoint: recompute the blocks in the backward pass, which saves memory.
        pretrain_img_size: side of the images that the absolute positions were made for.
        pretrain_use_cls_token: whether their table starts with a class token.
        out_feature: name of the feature map.
    """

    def __init__(
        self,
        img_size: int = 1024,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        use_abs_pos: bool = True,
        use_rel_pos: bool = False,
        rel_pos_zero_init: bool = True,
        window_size: int = 0,
        window_block_indexes: Sequence[int] = (),
        residual_block_indexes: Sequence[int] = (),
        use_act_checkpoint: bool = False,
        pretrain_img_size: int = 224,
        pretrain_use_cls_token: bool = True,
        out_feature: str = "last_feat",
    ) -> None:
        super().__init__()
        self.pretrain_use_cls_token = pretrain_use_cls_token
        self.use_act_checkpoint = use_act_checkpoint
        patch, grid = (patch_size,) * 2, (img_size // patch_size,) * 2
        self.patch_embed = PatchEmbed(patch, patch, in_chans=in_chans, embed_dim=embed_dim)
        kind = dict(norm_layer=norm_layer, act_layer=act_layer, input_size=grid)
        kind.update(use_rel_pos=use_rel_pos, rel_pos_zero_init=rel_pos_zero_init)
        self.blocks = nn.ModuleList()
        for i in range(depth):
            kind["window_size"] = window_size if i in window_block_indexes else 0
            kind["use_residual_block"] = i in residual_block_indexes
            drop_path = drop_path_rate * i / max(depth - 1, 1)
            self.blocks.append(Block(embed_dim, num_heads, mlp_ratio, qkv_bias, drop_path, **kind))
        positions = (pretrain_img_size // patch_size) ** 2 + int(pretrain_use_cls_token)
        self.pos_embed = _position_table(1, positions, embed_dim) if use_abs_pos else None
        self.apply(_init_linear)
        self._out_features = [out_feature]
        self._out_feature_channels, self._out_feature_strides = {out_feature: embed_dim}, {out_feature: patch_size}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, in_chans, H, W) -> {out_feature: (N, embed_dim, H / patch_size, W / patch_size)}."""
        tokens, positions = self.patch_embed(x), self.pos_embed
        if positions is not None:
            tokens = tokens + get_abs_pos(positions, self.pretrain_use_cls_token, tokens.shape[1:3])
        for block in self.blocks:
            if self.use_act_checkpoint and self.training:
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        return {self._out_features[0]: tokens.permute(0, 3, 1, 2)}


def _position_table(*shape: int, zero: bool = False) -> nn.Parameter:
    """Learned positions, which start close to zero or at it."""
    table = nn.Parameter(torch.zeros(shape))
    return table if zero else nn.init.trunc_normal_(table, std=0.02)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Block(nn.Module):
    """Transformer block: attention and MLP, each after a norm and beside a shortcut.

    Args:
        dim: channels.
        drop_path: rate of stochastic depth.
        window_size: side of the attention windows; 0 for global attention.
        use_residual_block: append a convolutional residual block.
        input_size: nominal (H, W) of the token grid.

    The other arguments are as for `ViT`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        use_rel_pos: bool = False,
        rel_pos_zero_init: bool = True,
        window_size: int = 0,
        use_residual_block: bool = False,
        input_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        grid = (window_size, window_size) if window_size else input_size
        attention = Attention(dim, num_heads, qkv_bias, use_rel_pos, rel_pos_zero_init, grid)
        self.norm1, self.attn = norm_layer(dim), attention
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer)
        self.window_size = window_size
        self.use_residual_block = use_residual_block
        if use_residual_block:
            self.residual = ResBottleneckBlock(dim, dim, dim // 2, norm="LN", act_layer=act_layer)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> the same shape."""
        x = x + self.drop_path(self._attend(self.norm1(x)))
        out = x + self.drop_path(self.mlp(self.norm2(x)))
        return self.residual(out.movedim(3, 1)).movedim(1, 3) if self.use_residual_block else out

    def _attend(self, x: Tensor) -> Tensor:
        """Attention within the windows, or everywhere."""
        if self.window_size == 0:
            return self.attn(x)
        windows, pad_hw = window_partition(x, self.window_size)
        return window_unpartition(self.attn(windows), self.window_size, pad_hw, x.shape[1:3])


class Attention(nn.Module):
    """Multi-head self-attention over a grid of tokens, with optional decomposed relative positions.

    Args:
        dim: channels.
        num_heads: heads; must divide `dim`.
        qkv_bias: whether queries, keys and values have a bias.
        use_rel_pos: add relative positions to the logits.
        rel_pos_zero_init: they start at zero.
        input_size: nominal (H, W) of the grid, needed with `use_rel_pos`; for others, tables are resized.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        use_rel_pos: bool = False,
        rel_pos_zero_init: bool = True,
        input_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)
        self.use_rel_pos = use_rel_pos
        if use_rel_pos:
            tables = [_position_table(2 * n - 1, dim // num_heads, zero=rel_pos_zero_init) for n in input_size]
            self.rel_pos_h, self.rel_pos_w = tables

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> the same shape."""
        b, h, w, dim = x.shape
        qkv = self.qkv(x).view(b, h * w, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = self._position_bias(q, (h, w)) if self.use_rel_pos else None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(out.transpose(1, 2).reshape(b, h, w, dim))

    def _position_bias(self, q: Tensor, grid: tuple[int, int]) -> Tensor:
        """Relative position terms of the logits, (B, num_heads, H * W, H * W), for queries `q`."""
        rel_h, rel_w = decomposed_rel_pos(q.flatten(0, 1), self.rel_pos_h, self.rel_pos_w, grid, grid)
        bias = rel_h[..., :, None] + rel_w[..., None, :]
        return bias.view(*q.shape[:3], q.shape[2])


class Mlp(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, dim: int, hidden_dim: int, act_layer: Callable[[], nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> the same shape."""
        return self.fc2(self.act(self.fc1(x)))


class ResBottleneckBlock(CNNBlockBase):
    """Bottleneck of 1x1, 3x3 and 1x1 convolutions beside an identity shortcut; starts as the identity."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bottleneck_channels: int,
        norm: Norm = "LN",
        act_layer: Callable[[], nn.Module] = nn.GELU,
    ) -> None:
        super().__init__(in_channels, out_channels, stride=1)
        width = bottleneck_channels
        convs = [
            Conv2d(in_channels, width, 1, bias=False),
            Conv2d(width, width, 3, padding=1, bias=False),
            Conv2d(width, out_channels, 1, bias=False),
        ]
        for i, conv in enumerate(convs, start=1):
            weight_init.c2_msra_fill(conv)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"norm{i}", get_norm(norm, conv.out_channels))
            if conv is not convs[-1]:
                self.add_module(f"act{i}", act_layer())
        nn.init.zeros_(self.norm3.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H, W)."""
        out = x
        for layer in self.children():
            out = layer(out)
        return x + out


def get_vit_lr_decay_rate(name: str, lr_decay_rate: float = 1.0, num_layers: int = 12) -> float:
    """Factor on the learning rate of a parameter, smaller the nearer it is to the input (arXiv 2106.08254).

    Args:
        name: name of the parameter in the model, e.g. "backbone.net.blocks.3.attn.qkv.weight".
        lr_decay_rate: factor from one layer to the one before.
        num_layers: number of transformer blocks.

    Returns:
        `lr_decay_rate ** (num_layers + 1 - layer)`: patches and positions are layer 0, block i is layer
        i + 1, and everything else, the convolutional residual blocks too, has the full rate.
    """
    inside = name.startswith("backbone")
    block = re.search(r"\.blocks\.(\d+)\.(?!.*\bresidual\.)", name)
    if inside and re.search(r"\.(pos|patch)_embed", name):
        layer = 0
    elif inside and block:
        layer = int(block[1]) + 1
    else:
        layer = num_layers + 1
    return lr_decay_rate ** (num_layers + 1 - layer)
