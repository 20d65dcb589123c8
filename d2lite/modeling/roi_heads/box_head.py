"""Heads that turn the pooled features of a region into one feature vector."""

import math

import torch
from fvcore.nn.weight_init import c2_msra_fill, c2_xavier_fill
from torch import Tensor, nn

from d2lite.config import CfgNode, configurable
from d2lite.layers import Conv2d, ShapeSpec, get_norm
from d2lite.utils.registry import Registry

ROI_BOX_HEAD_REGISTRY = Registry("ROI_BOX_HEAD")
"""Modules that turn pooled features (R, C, H, W) into those of the box predictor, and have an `output_shape`.

Called as `cls(cfg, input_shape)` with a `ShapeSpec`.
"""


def build_box_head(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """Builds the head named by `cfg.MODEL.ROI_BOX_HEAD.NAME` for pooled features of `input_shape`."""
    return ROI_BOX_HEAD_REGISTRY.build(cfg.MODEL.ROI_BOX_HEAD.NAME, cfg, input_shape)


@ROI_BOX_HEAD_REGISTRY.register()
class FastRCNNConvFCHead(nn.Sequential):
    """Some 3x3 convolutions, then some fully connected layers, each with a ReLU."""

    @configurable
    def __init__(
        self, input_shape: ShapeSpec, *, conv_dims: list[int], fc_dims: list[int], conv_norm: str = ""
    ) -> None:
        """
        Args:
            input_shape: channels, height and width of the pooled features.
            conv_dims: output channels of each convolution.
            fc_dims: output size of each fully connected layer.
            conv_norm: normalization of the convolutions, see `get_norm`.
        """
        super().__init__()
        if not conv_dims and not fc_dims:
            raise ValueError("The box head needs a layer: set MODEL.ROI_BOX_HEAD.NUM_CONV or NUM_FC above 0")
        channels, *grid = input_shape.channels, input_shape.height, input_shape.width
        for i, dim in enumerate(conv_dims, start=1):
            options = dict(bias=not conv_norm, norm=get_norm(conv_norm, dim), activation=nn.ReLU(inplace=not conv_norm))
            self.add_module(f"conv{i}", Conv2d(channels, dim, 3, padding=1, **options))
            channels = dim
        size = (channels, *grid)
        if fc_dims:
            self.flatten = nn.Flatten()
        for i, dim in enumerate(fc_dims, start=1):
            self.add_module(f"fc{i}", nn.Linear(math.prod(size), dim))
            self.add_module(f"fc_relu{i}", nn.ReLU())
            size = (dim,)
        self._output_size = size
        for layer in self:
            if isinstance(layer, Conv2d):
                c2_msra_fill(layer)
            elif isinstance(layer, nn.Linear):
                c2_xavier_fill(layer)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        """Constructor arguments from MODEL.ROI_BOX_HEAD."""
        head = cfg.MODEL.ROI_BOX_HEAD
        convs, fcs = [head.CONV_DIM] * head.NUM_CONV, [head.FC_DIM] * head.NUM_FC
        return dict(input_shape=input_shape, conv_dims=convs, fc_dims=fcs, conv_norm=head.NORM)

    def forward(self, x: Tensor) -> Tensor:
        """(R, C, H, W) -> (R, D), or (R, D, H, W) without fully connected layers; R may be 0."""
        for layer in self:
            x = layer(x)
        return x

    # TorchScript reads the annotations even of unused methods, and cannot compile ShapeSpec.
    @property
    @torch.jit.unused
    def output_shape(self):  # type: ignore[no-untyped-def]
        """The `ShapeSpec` of the output: channels, and height and width where it has them."""
        return ShapeSpec(*self._output_size)
