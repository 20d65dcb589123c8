"""Plain vision transformer with windowed and global attention for detection (ViTDet, arXiv 2203.16527)."""

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
        self.patch_embed = PatchEmbed(
            kernel_size=(patch_size, patch_size),
            stride=(patch_size, patch_size),
            in_chans=in_chans,
            embed_dim=embed_dim,
        )
        self.pos_embed = None
        if use_abs_pos:
            num_positions = (pretrain_img_size // patch_size) ** 2 + int(pretrain_use_cls_token)
            self.pos_embed = nn.Parameter(torch.zeros(1, num_positions, embed_dim))
        self.blocks = nn.ModuleList(
            Block(
                dim=embed_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                drop_path=drop_path_rate * i / max(depth - 1, 1),
                norm_layer=norm_layer,
                act_layer=act_layer,
                use_rel_pos=use_rel_pos,
                rel_pos_zero_init=rel_pos_zero_init,
                window_size=window_size if i in window_block_indexes else 0,
                use_residual_block=i in residual_block_indexes,
                input_size=(img_size // patch_size, img_size // patch_size),
            )
            for i in range(depth)
        )
        self._out_feature_channels = {out_feature: embed_dim}
        self._out_feature_strides = {out_feature: patch_size}
        self._out_features = [out_feature]
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(_init_linear)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, in_chans, H, W) -> {out_feature: (N, embed_dim, H / patch_size, W / patch_size)}."""
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            x = x + get_abs_pos(self.pos_embed, self.pretrain_use_cls_token, x.shape[1:3])
        for block in self.blocks:
            if self.use_act_checkpoint and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return {self._out_features[0]: x.permute(0, 3, 1, 2)}


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
        self.norm1 = norm_layer(dim)
        self.attn = Attention(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            use_rel_pos=use_rel_pos,
            rel_pos_zero_init=rel_pos_zero_init,
            input_size=(window_size, window_size) if window_size else input_size,
        )
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer)
        self.window_size = window_size
        self.use_residual_block = use_residual_block
        if use_residual_block:
            self.residual = ResBottleneckBlock(dim, dim, dim // 2, norm="LN", act_layer=act_layer)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> the same shape."""
        y = self.norm1(x)
        if self.window_size > 0:
            windows, pad_hw = window_partition(y, self.window_size)
            y = window_unpartition(self.attn(windows), self.window_size, pad_hw, x.shape[1:3])
        else:
            y = self.attn(y)
        x = x + self.drop_path(y)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        if self.use_residual_block:
            x = self.residual(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x


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
        head_dim = dim // num_heads
        self.scale = head_dim**-0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.use_rel_pos = use_rel_pos
        if use_rel_pos:
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * input_size[0] - 1, head_dim))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * input_size[1] - 1, head_dim))
            if not rel_pos_zero_init:
                nn.init.trunc_normal_(self.rel_pos_h, std=0.02)
                nn.init.trunc_normal_(self.rel_pos_w, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> the same shape."""
        b, h, w, dim = x.shape
        qkv = self.qkv(x).view(b, h * w, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = self._position_bias(q, (h, w)) if self.use_rel_pos else None
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        return self.proj(x.transpose(1, 2).reshape(b, h, w, dim))

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
        super().__init__(in_channels, out_channels, 1)
        self.conv1 = Conv2d(in_channels, bottleneck_channels, 1, bias=False)
        self.norm1 = get_norm(norm, bottleneck_channels)
        self.act1 = act_layer()
        self.conv2 = Conv2d(bottleneck_channels, bottleneck_channels, 3, padding=1, bias=False)
        self.norm2 = get_norm(norm, bottleneck_channels)
        self.act2 = act_layer()
        self.conv3 = Conv2d(bottleneck_channels, out_channels, 1, bias=False)
        self.norm3 = get_norm(norm, out_channels)
        for conv in (self.conv1, self.conv2, self.conv3):
            weight_init.c2_msra_fill(conv)
        nn.init.zeros_(self.norm3.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H, W)."""
        out = self.act1(self.norm1(self.conv1(x)))
        out = self.act2(self.norm2(self.conv2(out)))
        return x + self.norm3(self.conv3(out))


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
    layer = num_layers + 1
    if name.startswith("backbone"):
        if ".pos_embed" in name or ".patch_embed" in name:
            layer = 0
        elif ".blocks." in name and ".residual." not in name:
            layer = int(name.split(".blocks.")[1].split(".")[0]) + 1
    return lr_decay_rate ** (num_layers + 1 - layer)
