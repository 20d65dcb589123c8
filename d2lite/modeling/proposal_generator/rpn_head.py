"""The head of a region proposal network: from feature maps to a score and a box for every anchor."""

from collections.abc import Sequence

import torch
from torch import nn

from d2lite.config import CfgNode, configurable
from d2lite.layers import Conv2d, ShapeSpec
from d2lite.modeling.anchor_generator import build_anchor_generator
from d2lite.utils.registry import Registry

RPN_HEAD_REGISTRY = Registry("RPN_HEAD")
"""Modules that turn a list of feature maps into objectness logits and anchor deltas per level.

Called as `cls(cfg, input_shape)` with `input_shape` a list of `ShapeSpec`.
"""


def build_rpn_head(cfg: CfgNode, input_shape: list[ShapeSpec]) -> nn.Module:
    """Builds the head named by `cfg.MODEL.RPN.HEAD_NAME` for feature maps of `input_shape`."""
    return RPN_HEAD_REGISTRY.build(cfg.MODEL.RPN.HEAD_NAME, cfg, input_shape)


@RPN_HEAD_REGISTRY.register()
class StandardRPNHead(nn.Module):
    """3x3 convolutions, then a 1x1 convolution each for objectness and deltas; shared by all levels."""

    @configurable
    def __init__(
        self, *, in_channels: int, num_anchors: int, box_dim: int = 4, conv_dims: Sequence[int] = (-1,)
    ) -> None:
        """
        Args:
            in_channels: channels of every feature map.
            num_anchors: anchors per cell.
            box_dim: numbers that describe one box.
            conv_dims: channels of each 3x3 convolution; -1 means as many as come in.
        """
        super().__init__()
        convs = nn.Sequential()
        channels = in_channels
        for i, dim in enumerate(conv_dims):
            out_channels = channels if dim == -1 else dim
            if out_channels <= 0:
                raise ValueError(f"MODEL.RPN.CONV_DIMS must hold positive numbers or -1, got {list(conv_dims)}")
            convs.add_module(
                f"conv{i}", Conv2d(channels, out_channels, kernel_size=3, padding=1, activation=nn.ReLU(True))
            )
            channels = out_channels
        # checkpoints of the usual single convolution say "conv.weight", without an index
        self.conv = convs[0] if len(convs) == 1 else convs
        self.objectness_logits = nn.Conv2d(channels, num_anchors, kernel_size=1)
        self.anchor_deltas = nn.Conv2d(channels, num_anchors * box_dim, kernel_size=1)
        for conv in (module for module in self.modules() if isinstance(module, nn.Conv2d)):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict:
        """Constructor arguments from MODEL.RPN and MODEL.ANCHOR_GENERATOR.

        Raises:
            ValueError: if the levels differ in channels, or in anchors per cell.
        """
        channels = {shape.channels for shape in input_shape}
        if len(channels) != 1:
            raise ValueError(
                "The RPN head is shared by all levels, but MODEL.RPN.IN_FEATURES"
                f" {list(cfg.MODEL.RPN.IN_FEATURES)} have {[x.channels for x in input_shape]} channels"
            )
        anchors = build_anchor_generator(cfg, input_shape)
        per_cell = set(anchors.num_anchors)
        if len(per_cell) != 1:
            raise ValueError(
                "The RPN head is shared by all levels, but MODEL.ANCHOR_GENERATOR gives them different"
                f" numbers of anchors per cell: {anchors.num_anchors}"
            )
        return {
            "in_channels": channels.pop(),
            "num_anchors": per_cell.pop(),
            "box_dim": anchors.box_dim,
            "conv_dims": cfg.MODEL.RPN.CONV_DIMS,
        }

    def forward(self, features: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """
        Args:
            features: feature maps (N, C, H_i, W_i).

        Returns:
            Objectness logits (N, A, H_i, W_i) and deltas (N, A * box_dim, H_i, W_i) of each level.
        """
        logits, deltas = [], []
        for x in features:
            hidden = self.conv(x)
            logits.append(self.objectness_logits(hidden))
            deltas.append(self.anchor_deltas(hidden))
        return logits, deltas
