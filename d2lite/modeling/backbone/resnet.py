"""Residual networks: ResNet (arXiv 1512.03385), ResNeXt (1611.05431), with deformable blocks (1703.06211)."""

import math
from itertools import chain
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from d2lite.layers import CNNBlockBase, ShapeSpec
from d2lite.layers import CNNBlockBase as ResNetBlockBase
from d2lite.modeling.backbone.backbone import Backbone
from d2lite.modeling.backbone.build import BACKBONE_REGISTRY
from d2lite.modeling.backbone.resnet_blocks import BasicBlock, BasicStem, BottleneckBlock, DeformBottleneckBlock

__all__ = [
    "BasicBlock",
    "BasicStem",
    "BottleneckBlock",
    "DeformBottleneckBlock",
    "ResNet",
    "ResNetBlockBase",
    "build_resnet_backbone",
    "make_stage",
]

_BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class ResNet(Backbone):
    """A stem and stages "res2", "res3", ... of residual blocks; with a classifier if `num_classes` is given.

    Args:
        stem: module with `out_channels` and `stride`; its output is the feature "stem".
        stages: one list of blocks per stage; no more than `out_features` needs are kept.
        num_classes: if given, global pooling and a linear layer make the feature "linear", (N, num_classes).
        out_features: names to return; by default the last one only.
        freeze_at: as for `freeze`.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: list[list[CNNBlockBase]],
        num_classes: int | None = None,
        out_features: list[str] | None = None,
        freeze_at: int = 0,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.num_classes = num_classes
        stages = stages[: _num_stages_needed(stages, out_features)]
        self.stage_names = tuple(f"res{i}" for i in range(2, 2 + len(stages)))
        channels, stride = stem.out_channels, stem.stride
        shapes = {"stem": (channels, stride)}
        for name, blocks in zip(self.stage_names, stages, strict=True):
            if not blocks or not all(isinstance(block, CNNBlockBase) for block in blocks):
                raise AssertionError(f"{name} must be a non-empty list of CNNBlockBase, got {blocks}")
            self.add_module(name, nn.Sequential(*blocks))
            channels, stride = blocks[-1].out_channels, stride * math.prod(block.stride for block in blocks)
            shapes[name] = (channels, stride)
        self.stages = [getattr(self, name) for name in self.stage_names]

        if num_classes is not None:
            classifier = nn.Linear(channels, num_classes)
            # arXiv 1706.02677, section 5.1
            nn.init.normal_(classifier.weight, std=0.01)
            self.avgpool, self.linear = nn.AdaptiveAvgPool2d(1), classifier
            shapes["linear"] = (num_classes, stride)
        self._out_feature_channels = {name: size for name, (size, _) in shapes.items()}
        self._out_feature_strides = {name: size for name, (_, size) in shapes.items()}
        self._out_features = [list(shapes)[-1]] if out_features is None else list(out_features)
        self._check_out_features()
        self.freeze(freeze_at)

    def _check_out_features(self) -> None:
        unknown = [name for name in self._out_features if name not in self._out_feature_channels]
        if unknown or not self._out_features:
            raise AssertionError(
                f"ResNet has no features {unknown or 'to return'}; available: {', '.join(self._out_feature_channels)}"
            )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W) -> {name: features}, for the names in `out_features`."""
        assert x.dim() == 4, f"ResNet needs an input of shape (N, C, H, W), got {list(x.shape)}"
        outputs: dict[str, Tensor] = {}
        # Not over self.stages, because TorchScript does not support a plain list of modules.
        for name, part in self.named_children():
            if name == "stem" or name in self.stage_names:
                x = part(x)
                if name in self._out_features:
                    outputs[name] = x
        if self.num_classes is not None and "linear" in self._out_features:
            outputs["linear"] = self.linear(torch.flatten(self.avgpool(x), 1))
        return outputs

    def freeze(self, freeze_at: int = 0) -> "ResNet":
        """Freezes the first `freeze_at` parts (1: the stem, 2: the stem and "res2", ...); returns self."""
        parts = [[self.stem], *(stage.children() for stage in self.stages)]
        for block in chain.from_iterable(parts[: max(freeze_at, 0)]):
            block.freeze()
        return self

    @staticmethod
    def make_stage(
        block_class: type[CNNBlockBase],
        num_blocks: int,
        *,
        in_channels: int,
        out_channels: int,
        **kwargs: Any,
    ) -> list[CNNBlockBase]:
        """Makes the blocks of one stage.

        Args:
            block_class: class of the blocks.
            num_blocks: how many.
            in_channels: input channels of the first block; the others have `out_channels`.
            out_channels: output channels of all blocks.
            **kwargs: passed to `block_class`; `X_per_block` is a list of the values of X for the blocks.
        """
        lists = [key for key in kwargs if key.endswith("_per_block")]
        per_block = {key.removesuffix("_per_block"): kwargs.pop(key) for key in lists}
        for name, values in per_block.items():
            if len(values) != num_blocks or name in kwargs:
                raise AssertionError(
                    f"{name}_per_block needs {num_blocks} values and no {name!r} beside it, got {values}"
                )
        blocks = []
        for i in range(num_blocks):
            own = {name: values[i] for name, values in per_block.items()}
            blocks.append(block_class(in_channels=in_channels, out_channels=out_channels, **own, **kwargs))
            in_channels = out_channels
        return blocks

    @staticmethod
    def make_default_stages(
        depth: int, block_class: type[CNNBlockBase] | None = None, **kwargs: Any
    ) -> list[list[CNNBlockBase]]:
        """Makes the four stages of the published ResNet of this `depth` (18, 34, 50, 101 or 152).

        Args:
            depth: number of layers.
            block_class: default `BasicBlock` below 50, else `BottleneckBlock`.
            **kwargs: passed to the blocks; not "stride_per_block", "in_channels" or "out_channels".
        """
        basic = depth < 50
        block_class = block_class or (BasicBlock if basic else BottleneckBlock)
        in_channels, channels = 64, 64 if basic else 256
        stages = []
        for i, num_blocks in enumerate(_BLOCKS_PER_STAGE[depth]):
            if not basic:
                kwargs["bottleneck_channels"] = channels // 4
            sizes = dict(in_channels=in_channels, out_channels=channels)
            strides = [1 if i == 0 else 2] + [1] * (num_blocks - 1)
            stages.append(ResNet.make_stage(block_class, num_blocks, stride_per_block=strides, **sizes, **kwargs))
            in_channels, channels = channels, channels * 2
        return stages


def _num_stages_needed(stages: list[list[CNNBlockBase]], out_features: list[str] | None) -> int:
    """Number of stages up to the deepest feature; all of them for "linear" or a name that is unknown."""
    if out_features is None:
        return len(stages)
    numbers = {"stem": 0} | {f"res{i}": i - 1 for i in range(2, 2 + len(stages))}
    return max((numbers.get(name, len(stages)) for name in out_features), default=0)


make_stage = ResNet.make_stage


@BACKBONE_REGISTRY.register()
def build_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Builds a ResNet or ResNeXt from `cfg.MODEL.RESNETS` and `cfg.MODEL.BACKBONE.FREEZE_AT`.

    Raises:
        AssertionError: if the keys under `MODEL.RESNETS` contradict each other.
    """
    c = cfg.MODEL.RESNETS
    _check_config(c)
    stem = BasicStem(in_channels=input_shape.channels, out_channels=c.STEM_OUT_CHANNELS, norm=c.NORM)
    widths = [c.STEM_OUT_CHANNELS] + [c.RES2_OUT_CHANNELS * 2**i for i in range(4)]
    stages = []
    for i, num_blocks in enumerate(_BLOCKS_PER_STAGE[c.DEPTH]):
        dilation = c.RES5_DILATION if i == 3 else 1
        strides = [1 if i == 0 or dilation == 2 else 2] + [1] * (num_blocks - 1)
        block_class, kwargs = BasicBlock, dict(in_channels=widths[i], out_channels=widths[i + 1], norm=c.NORM)
        if c.DEPTH >= 50:
            block_class = BottleneckBlock
            kwargs.update(bottleneck_channels=c.NUM_GROUPS * c.WIDTH_PER_GROUP * 2**i, num_groups=c.NUM_GROUPS)
            kwargs.update(stride_in_1x1=c.STRIDE_IN_1X1, dilation=dilation)
        if c.DEFORM_ON_PER_STAGE[i]:
            block_class = DeformBottleneckBlock
            kwargs.update(deform_modulated=c.DEFORM_MODULATED, deform_num_groups=c.DEFORM_NUM_GROUPS)
        stages.append(ResNet.make_stage(block_class, num_blocks, stride_per_block=strides, **kwargs))
    return ResNet(stem, stages, out_features=c.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)


def _check_config(c: CfgNode) -> None:
    """Checks the keys under MODEL.RESNETS."""
    if c.DEPTH not in _BLOCKS_PER_STAGE:
        raise AssertionError(f"MODEL.RESNETS.DEPTH is {c.DEPTH}; choose one of {list(_BLOCKS_PER_STAGE)}")
    if c.RES5_DILATION not in (1, 2):
        raise AssertionError(f"MODEL.RESNETS.RES5_DILATION is {c.RES5_DILATION}; it must be 1 or 2")
    if c.DEPTH >= 50:
        return
    needed = {
        "RES2_OUT_CHANNELS": 64,
        "RES5_DILATION": 1,
        "NUM_GROUPS": 1,
        "DEFORM_ON_PER_STAGE": [False] * 4,
    }
    for key, value in needed.items():
        if c[key] != value:
            raise AssertionError(f"MODEL.RESNETS.{key} is {c[key]}; ResNet-{c.DEPTH} needs {value}")
