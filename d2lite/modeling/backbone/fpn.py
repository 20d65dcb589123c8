"""Feature pyramid network (arXiv 1612.03144) on top of a ResNet."""

import math

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from d2lite.layers import Conv2d, ShapeSpec, get_norm
from d2lite.layers.batch_norm import Norm
from d2lite.modeling.backbone.backbone import Backbone
from d2lite.modeling.backbone.build import BACKBONE_REGISTRY
from d2lite.modeling.backbone.resnet import build_resnet_backbone


class FPN(Backbone):
    """Adds a top-down path with lateral connections to a network; gives "p2", "p3", ... (stride 2^k).

    Args:
        bottom_up: the network below, kept as `self.bottom_up`.
        in_features: its features to use, finest first; each stride must be twice the one before.
        out_channels: channels of all pyramid levels.
        norm: normalization of the lateral and output convolutions, as for `get_norm`.
        top_block: module that makes `num_levels` coarser levels out of the feature `in_feature` (a bottom-up
            feature or a pyramid level), and returns them as a list.
        fuse_type: how lateral and top-down features are joined, "sum" or "avg".
        square_pad: if positive, images are to be padded to squares of this size.
    """

    def __init__(
        self,
        bottom_up: Backbone,
        in_features: list[str],
        out_channels: int,
        norm: Norm = "",
        top_block: nn.Module | None = None,
        fuse_type: str = "sum",
        square_pad: int = 0,
    ) -> None:
        super().__init__()
        if fuse_type not in ("sum", "avg"):
            raise AssertionError(f"MODEL.FPN.FUSE_TYPE (fuse_type) is {fuse_type!r}; use 'sum' or 'avg'")
        if not in_features:
            raise AssertionError("MODEL.FPN.IN_FEATURES (in_features) is empty")
        shapes = bottom_up.output_shape()
        strides = [shapes[name].stride for name in in_features]
        _check_strides(dict(zip(in_features, strides, strict=True)))

        levels = [int(math.log2(stride)) for stride in strides]
        self.lateral_convs, self.output_convs = [], []
        for name, level in zip(in_features, levels, strict=True):
            lateral = _conv(shapes[name].channels, out_channels, 1, norm)
            output = _conv(out_channels, out_channels, 3, norm)
            self.add_module(f"fpn_lateral{level}", lateral)
            self.add_module(f"fpn_output{level}", output)
            # Kept from coarse to fine, the order of the top-down path.
            self.lateral_convs.insert(0, lateral)
            self.output_convs.insert(0, output)

        self.top_block = top_block
        self.in_features, self._top_down_features = tuple(in_features), tuple(reversed(in_features))
        self.bottom_up = bottom_up
        _declare_levels(self, levels, out_channels)
        self._coarsest_stride, self._square_size = strides[-1], square_pad
        self._averages = fuse_type == "avg"

    @property
    def size_divisibility(self) -> int:
        return self._coarsest_stride

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"square_size": self._square_size}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W) -> {"p<k>": (N, out_channels, H / 2^k, W / 2^k)}."""
        features = self.bottom_up(x)
        results: list[Tensor] = []
        top_down: Tensor | None = None
        for name, lateral_conv, output_conv in zip(self._top_down_features, self.lateral_convs, self.output_convs):
            fused = lateral_conv(features[name])
            if top_down is not None:
                fused = fused + F.interpolate(top_down, scale_factor=2.0, mode="nearest")
                fused = fused / 2 if self._averages else fused
            top_down = fused
            results.insert(0, output_conv(fused))
        return _name_levels(self, features, results)


def _declare_levels(pyramid: Backbone, levels: list[int], channels: int) -> None:
    """Declares the outputs "p<level>" of a pyramid: its own `levels`, finest first, and those of its top block."""
    if pyramid.top_block is not None:
        levels = levels + [levels[-1] + 1 + i for i in range(pyramid.top_block.num_levels)]
    pyramid._out_feature_strides = {f"p{level}": 2**level for level in levels}
    pyramid._out_features = list(pyramid._out_feature_strides)
    pyramid._out_feature_channels = dict.fromkeys(pyramid._out_features, channels)


def _name_levels(pyramid: Backbone, features: dict[str, Tensor], levels: list[Tensor]) -> dict[str, Tensor]:
    """The output of a pyramid: its own `levels`, and those that its top block makes of one of the `features` of the
    network below, or of one of the levels.
    """
    names, top = pyramid._out_features, pyramid.top_block
    if top is not None:
        source = features[top.in_feature] if top.in_feature in features else levels[names.index(top.in_feature)]
        levels = [*levels, *top(source)]
    assert len(levels) == len(names), "the top block gives another number of levels than it declares"
    return dict(zip(names, levels))


def _level_conv(in_channels: int, out_channels: int, kernel_size: int, norm: Norm) -> Conv2d:
    """A convolution that keeps the size of the map, with a bias where it has no norm."""
    norm_layer = get_norm(norm, out_channels)
    return Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=not norm, norm=norm_layer)


def _conv(in_channels: int, out_channels: int, kernel_size: int, norm: Norm) -> Conv2d:
    conv = _level_conv(in_channels, out_channels, kernel_size, norm)
    weight_init.c2_xavier_fill(conv)
    return conv


def _check_strides(strides: dict[str, int]) -> None:
    """Checks that each stride is a power of two and twice the one before."""
    values = list(strides.values())
    if any(s & (s - 1) for s in values) or any(b != 2 * a for a, b in zip(values, values[1:])):
        raise AssertionError(f"FPN needs features whose strides double from one to the next, got {strides}")


class LastLevelMaxPool(nn.Module):
    """Makes one more level, P6 of Faster R-CNN, by taking every second pixel of P5."""

    def __init__(self) -> None:
        super().__init__()
        self.num_levels = 1
        self.in_feature = "p5"

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, C, H, W) -> [(N, C, H / 2, W / 2)]."""
        return [F.max_pool2d(x, kernel_size=1, stride=2)]


class LastLevelP6P7(nn.Module):
    """Makes the two coarsest levels of RetinaNet (arXiv 1708.02002) with strided convolutions."""

    def __init__(self, in_channels: int, out_channels: int, in_feature: str = "res5") -> None:
        super().__init__()
        self.num_levels = 2
        self.in_feature = in_feature
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        for conv in (self.p6, self.p7):
            weight_init.c2_xavier_fill(conv)

    def forward(self, c5: Tensor) -> list[Tensor]:
        """(N, C, H, W) -> [P6, P7] of half and a quarter of the size."""
        p6 = self.p6(c5)
        return [p6, self.p7(F.relu(p6))]


@BACKBONE_REGISTRY.register()
def build_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds ResNet + FPN with a max-pooled P6, from `cfg.MODEL.RESNETS` and `cfg.MODEL.FPN`."""
    return _build_fpn(cfg, build_resnet_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds ResNet + FPN with P6 and P7 made from "res5"; config keys as above."""
    resnet = build_resnet_backbone(cfg, input_shape)
    in_channels = resnet.output_shape()["res5"].channels
    return _build_fpn(cfg, resnet, LastLevelP6P7(in_channels, cfg.MODEL.FPN.OUT_CHANNELS))


def _build_fpn(cfg: CfgNode, bottom_up: Backbone, top_block: nn.Module) -> FPN:
    c = cfg.MODEL.FPN
    return FPN(
        bottom_up=bottom_up,
        in_features=c.IN_FEATURES,
        out_channels=c.OUT_CHANNELS,
        norm=c.NORM,
        top_block=top_block,
        fuse_type=c.FUSE_TYPE,
    )
