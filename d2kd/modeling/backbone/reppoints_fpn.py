"""BACKBONE "build_reppoints_resnet_fpn_backbone": a pyramid with a norm on every level, P6 and P7 from C5 alone."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from d2kd.errors import ConfigError
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, build_resnet_backbone
from detectron2.modeling.backbone import FPN


class StridedLevels(nn.Module):
    """Makes the two coarsest levels by strided convolutions, with a norm and without an activation in between."""

    def __init__(self, in_channels: int, out_channels: int, norm: str, in_feature: str) -> None:
        """
        Args:
            in_channels: of the feature `in_feature`.
            out_channels: of both levels.
            norm: as for Detectron2's `get_norm`.
            in_feature: what both are made of, for Detectron2's FPN.
        """
        super().__init__()
        self.num_levels = 2
        self.in_feature = in_feature
        self.p6 = _strided(in_channels, out_channels, norm)
        self.p7 = _strided(out_channels, out_channels, norm)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, C, H, W) -> two maps of half and a quarter of the size, rounded up."""
        p6 = self.p6(x)
        return [p6, self.p7(p6)]


class NormedFPN(FPN):
    """Detectron2's FPN, with its parameter names, for maps of any size: what is added is resized to the finer map."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W) -> {"p<k>": (N, out_channels, H / 2^k, W / 2^k)}, sides rounded up."""
        features = self.bottom_up(x)
        levels: list[Tensor] = []
        fused: Tensor | None = None
        for name, lateral, output in zip(reversed(self.in_features), self.lateral_convs, self.output_convs):
            finer = lateral(features[name])
            if fused is not None:
                finer = finer + F.interpolate(fused, size=finer.shape[-2:], mode="nearest")
            fused = finer
            levels.insert(0, output(fused))
        top: Any = self.top_block
        return dict(zip(self.output_shape(), [*levels, *top(features[top.in_feature])]))


def build_reppoints_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """ResNet and the FPN of RepPoints (arXiv 1904.11490, section 5): norm MODEL.FPN.NORM, two more levels from "res5".

    Reads MODEL.RESNETS and MODEL.FPN; deformable stages are those of MODEL.RESNETS.DEFORM_ON_PER_STAGE.

    Raises:
        ConfigError: `MODEL.FPN.FUSE_TYPE` is not "sum".
    """
    node = cfg.MODEL.FPN
    if node.FUSE_TYPE != "sum":
        raise ConfigError(f"MODEL.FPN.FUSE_TYPE is {node.FUSE_TYPE!r}; {cfg.MODEL.BACKBONE.NAME} has sum only.")
    bottom_up = build_resnet_backbone(cfg, input_shape)
    top_feature = node.IN_FEATURES[-1]
    channels = bottom_up.output_shape()[top_feature].channels
    pyramid = NormedFPN(
        bottom_up=bottom_up,
        in_features=node.IN_FEATURES,
        out_channels=node.OUT_CHANNELS,
        norm=node.NORM,
        top_block=StridedLevels(channels, node.OUT_CHANNELS, node.NORM, top_feature),
    )
    for name, module in pyramid.named_modules():
        if isinstance(module, nn.Conv2d) and not name.startswith("bottom_up."):
            nn.init.xavier_uniform_(module.weight)
    return pyramid


def _strided(in_channels: int, out_channels: int, norm: str) -> nn.Module:
    sizes = {"kernel_size": 3, "stride": 2, "padding": 1}
    return Conv2d(in_channels, out_channels, **sizes, bias=not norm, norm=get_norm(norm, out_channels))


if "build_reppoints_resnet_fpn_backbone" not in BACKBONE_REGISTRY:
    BACKBONE_REGISTRY.register(build_reppoints_resnet_fpn_backbone)
