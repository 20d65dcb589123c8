"""Residual networks: ResNet (arXiv 1512.03385), ResNeXt (1611.05431), deformable blocks (1703.06211)."""

from typing import Any

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from d2lite.layers import CNNBlockBase, Conv2d, DeformConv, ModulatedDeformConv, ShapeSpec, get_norm
from d2lite.layers.batch_norm import Norm
from d2lite.modeling.backbone.backbone import Backbone
from d2lite.modeling.backbone.build import BACKBONE_REGISTRY

ResNetBlockBase = CNNBlockBase

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
        freeze_at: as for :meth:`freeze`.
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
        self.stages = []
        channels, stride = stem.out_channels, stem.stride
        self._out_feature_channels = {"stem": channels}
        self._out_feature_strides = {"stem": stride}
        for name, blocks in zip(self.stage_names, stages, strict=True):
            if not blocks or not all(isinstance(block, CNNBlockBase) for block in blocks):
                raise AssertionError(f"{name} must be a non-empty list of CNNBlockBase, got {blocks}")
            stage = nn.Sequential(*blocks)
            self.add_module(name, stage)
            self.stages.append(stage)
            for block in blocks:
                stride *= block.stride
            channels = blocks[-1].out_channels
            self._out_feature_channels[name] = channels
            self._out_feature_strides[name] = stride

        last = self.stage_names[-1] if stages else "stem"
        if num_classes is not None:
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.linear = nn.Linear(channels, num_classes)
            # arXiv 1706.02677, section 5.1
            nn.init.normal_(self.linear.weight, std=0.01)
            last = "linear"
            self._out_feature_channels[last] = num_classes
            self._out_feature_strides[last] = stride
        self._out_features = list(out_features) if out_features is not None else [last]
        self._check_out_features()
        self.freeze(freeze_at)

    def _check_out_features(self) -> None:
        unknown = [name for name in self._out_features if name not in self._out_feature_channels]
        if unknown or not self._out_features:
            raise AssertionError(
                f"ResNet has no features {unknown or 'to return'}; available: "
                f"{', '.join(self._out_feature_channels)}"
            )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W) -> {name: features}, for the names in `out_features`."""
        assert x.dim() == 4, f"ResNet needs an input of shape (N, C, H, W), got {list(x.shape)}"
        outputs: dict[str, Tensor] = {}
        x = self.stem(x)
        if "stem" in self._out_features:
            outputs["stem"] = x
        # Not over self.stages: TorchScript does not understand a plain list of modules.
        for name, stage in self.named_children():
            if name in self.stage_names:
                x = stage(x)
                if name in self._out_features:
                    outputs[name] = x
        if self.num_classes is not None:
            if "linear" in self._out_features:
                outputs["linear"] = self.linear(torch.flatten(self.avgpool(x), 1))
        return outputs

    def freeze(self, freeze_at: int = 0) -> "ResNet":
        """Freeze the first `freeze_at` parts (1: the stem, 2: the stem and "res2", ...); returns self."""
        if freeze_at >= 1:
            self.stem.freeze()
        for stage in self.stages[: max(freeze_at - 1, 0)]:
            for block in stage.children():
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
        """Make the blocks of one stage.

        Args:
            block_class: class of the blocks.
            num_blocks: how many.
            in_channels: input channels of the first block; the others have `out_channels`.
            out_channels: output channels of all blocks.
            **kwargs: passed to `block_class`; ``X_per_block`` is a list of the values of X for the blocks.
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
            blocks.append(
                block_class(in_channels=in_channels, out_channels=out_channels, **own, **kwargs)
            )
            in_channels = out_channels
        return blocks

    @staticmethod
    def make_default_stages(
        depth: int, block_class: type[CNNBlockBase] | None = None, **kwargs: Any
    ) -> list[list[CNNBlockBase]]:
        """Make the four stages of the published ResNet of this `depth` (18, 34, 50, 101 or 152).

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
            strides = [1 if i == 0 else 2] + [1] * (num_blocks - 1)
            stages.append(
                ResNet.make_stage(
                    block_class,
                    num_blocks,
                    stride_per_block=strides,
                    in_channels=in_channels,
                    out_channels=channels,
                    **kwargs,
                )
            )
            in_channels, channels = channels, channels * 2
        return stages


def _num_stages_needed(stages: list[list[CNNBlockBase]], out_features: list[str] | None) -> int:
    """Number of stages up to the deepest feature; all of them for "linear" or a name that is unknown."""
    if out_features is None:
        return len(stages)
    numbers = {"stem": 0} | {f"res{i}": i - 1 for i in range(2, 2 + len(stages))}
    return max((numbers.get(name, len(stages)) for name in out_features), default=0)


def make_stage(*args: Any, **kwargs: Any) -> list[CNNBlockBase]:
    """The same as :meth:`ResNet.make_stage`."""
    return ResNet.make_stage(*args, **kwargs)


class BasicStem(CNNBlockBase):
    """A 7x7 convolution and a 3x3 max pool, stride 4 together."""

    def __init__(self, in_channels: int = 3, out_channels: int = 64, norm: Norm = "BN") -> None:
        super().__init__(in_channels, out_channels, 4)
        self.conv1 = Conv2d(
            in_channels,
            out_channels,
            kernel_size=7,
            stride=2,
            padding=3,
            bias=False,
            norm=get_norm(norm, out_channels),
        )
        weight_init.c2_msra_fill(self.conv1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H / 4, W / 4)."""
        return F.max_pool2d(F.relu_(self.conv1(x)), kernel_size=3, stride=2, padding=1)


class BasicBlock(CNNBlockBase):
    """Two 3x3 convolutions beside a shortcut, as in ResNet-18 and -34; the first has the stride."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, norm: Norm = "BN") -> None:
        super().__init__(in_channels, out_channels, stride)
        self.shortcut = _projection(in_channels, out_channels, stride, norm)
        self.conv1 = Conv2d(
            in_channels,
            out_channels,
            kernel_size=3,
            stride=stride,
            padding=1,
            bias=False,
            norm=get_norm(norm, out_channels),
        )
        self.conv2 = Conv2d(
            out_channels,
            out_channels,
            kernel_size=3,
            padding=1,
            bias=False,
            norm=get_norm(norm, out_channels),
        )
        _init_convs(self.shortcut, self.conv1, self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride)."""
        out = F.relu_(self.conv1(x))
        out = self.conv2(out)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class BottleneckBlock(CNNBlockBase):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut, as in ResNet-50 and deeper.

    Args:
        bottleneck_channels: output channels of the 3x3 convolution.
        num_groups: groups of the 3x3 convolution (ResNeXt).
        stride_in_1x1: the first 1x1 convolution has the stride (as in the paper), not the 3x3 one.
        dilation: of the 3x3 convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        num_groups: int = 1,
        norm: Norm = "BN",
        stride_in_1x1: bool = False,
        dilation: int = 1,
    ) -> None:
        super().__init__(in_channels, out_channels, stride)
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.shortcut = _projection(in_channels, out_channels, stride, norm)
        self.conv1 = _conv1x1(in_channels, bottleneck_channels, stride_1x1, norm)
        self.conv2 = Conv2d(
            bottleneck_channels,
            bottleneck_channels,
            kernel_size=3,
            stride=stride_3x3,
            padding=dilation,
            bias=False,
            groups=num_groups,
            dilation=dilation,
            norm=get_norm(norm, bottleneck_channels),
        )
        self.conv3 = _conv1x1(bottleneck_channels, out_channels, 1, norm)
        _init_convs(self.shortcut, self.conv1, self.conv2, self.conv3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride)."""
        out = F.relu_(self.conv1(x))
        out = F.relu_(self.conv2(out))
        out = self.conv3(out)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class DeformBottleneckBlock(CNNBlockBase):
    """`BottleneckBlock` whose 3x3 convolution is deformable; `conv2_offset` predicts where it reads.

    Args:
        deform_modulated: version 2, with a mask (arXiv 1811.11168).
        deform_num_groups: groups of channels that have their own offsets.

    The other arguments are as for `BottleneckBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        num_groups: int = 1,
        norm: Norm = "BN",
        stride_in_1x1: bool = False,
        dilation: int = 1,
        deform_modulated: bool = False,
        deform_num_groups: int = 1,
    ) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.deform_modulated = deform_modulated
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        geometry = dict(kernel_size=3, stride=stride_3x3, padding=dilation, dilation=dilation)
        self.shortcut = _projection(in_channels, out_channels, stride, norm)
        self.conv1 = _conv1x1(in_channels, bottleneck_channels, stride_1x1, norm)
        numbers_per_tap = 3 if deform_modulated else 2
        self.conv2_offset = Conv2d(bottleneck_channels, numbers_per_tap * 9 * deform_num_groups, **geometry)
        deform_conv = ModulatedDeformConv if deform_modulated else DeformConv
        self.conv2 = deform_conv(
            bottleneck_channels,
            bottleneck_channels,
            **geometry,
            bias=False,
            groups=num_groups,
            deformable_groups=deform_num_groups,
            norm=get_norm(norm, bottleneck_channels),
        )
        self.conv3 = _conv1x1(bottleneck_channels, out_channels, 1, norm)
        _init_convs(self.shortcut, self.conv1, self.conv2, self.conv3)
        nn.init.zeros_(self.conv2_offset.weight)
        nn.init.zeros_(self.conv2_offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride)."""
        out = F.relu_(self.conv1(x))
        offset = self.conv2_offset(out)
        if self.deform_modulated:
            coordinates = offset.shape[1] // 3 * 2
            out = self.conv2(out, offset[:, :coordinates], offset[:, coordinates:].sigmoid())
        else:
            out = self.conv2(out, offset)
        out = F.relu_(out)
        out = self.conv3(out)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


def _conv1x1(in_channels: int, out_channels: int, stride: int, norm: Norm) -> Conv2d:
    return Conv2d(
        in_channels, out_channels, kernel_size=1, stride=stride, bias=False, norm=get_norm(norm, out_channels)
    )


def _projection(in_channels: int, out_channels: int, stride: int, norm: Norm) -> Conv2d | None:
    """The shortcut of a block: nothing where it keeps the number of channels."""
    return None if in_channels == out_channels else _conv1x1(in_channels, out_channels, stride, norm)


def _init_convs(*convs: nn.Module | None) -> None:
    for conv in convs:
        if conv is not None:
            weight_init.c2_msra_fill(conv)


@BACKBONE_REGISTRY.register()
def build_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Build a ResNet or ResNeXt from ``cfg.MODEL.RESNETS`` and ``cfg.MODEL.BACKBONE.FREEZE_AT``.

    Raises:
        AssertionError: the keys under ``MODEL.RESNETS`` contradict each other.
    """
    c = cfg.MODEL.RESNETS
    _check_config(c)
    stem = BasicStem(in_channels=input_shape.channels, out_channels=c.STEM_OUT_CHANNELS, norm=c.NORM)
    in_channels, out_channels = c.STEM_OUT_CHANNELS, c.RES2_OUT_CHANNELS
    bottleneck_channels = c.NUM_GROUPS * c.WIDTH_PER_GROUP
    stages = []
    for i, num_blocks in enumerate(_BLOCKS_PER_STAGE[c.DEPTH]):
        dilation = c.RES5_DILATION if i == 3 else 1
        first_stride = 1 if i == 0 or dilation == 2 else 2
        block_class, kwargs = BasicBlock, {}
        if c.DEPTH >= 50:
            block_class = BottleneckBlock
            kwargs = dict(
                bottleneck_channels=bottleneck_channels,
                num_groups=c.NUM_GROUPS,
                stride_in_1x1=c.STRIDE_IN_1X1,
                dilation=dilation,
            )
        if c.DEFORM_ON_PER_STAGE[i]:
            block_class = DeformBottleneckBlock
            kwargs.update(deform_modulated=c.DEFORM_MODULATED, deform_num_groups=c.DEFORM_NUM_GROUPS)
        stages.append(
            ResNet.make_stage(
                block_class,
                num_blocks,
                stride_per_block=[first_stride] + [1] * (num_blocks - 1),
                in_channels=in_channels,
                out_channels=out_channels,
                norm=c.NORM,
                **kwargs,
            )
        )
        in_channels, out_channels = out_channels, out_channels * 2
        bottleneck_channels *= 2
    return ResNet(stem, stages, out_features=c.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)


def _check_config(c: CfgNode) -> None:
    """Check the keys under MODEL.RESNETS."""
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
