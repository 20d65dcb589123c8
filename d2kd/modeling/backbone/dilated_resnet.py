"""BACKBONE "build_dilated_resnet_backbone": ResNets whose last stages are dilated instead of strided."""

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from fvcore.nn import weight_init
from torch import Tensor

from d2kd.config import config_check, declare_keys, get_key
from d2kd.detectron2_keys import RESNETS
from d2kd.errors import ConfigError
from d2kd.settings import setting
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, ResNet
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock

NAME = "build_dilated_resnet_backbone"
#: Blocks of res2 to res5, by depth (arXiv 1512.03385, table 1).
_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}

declare_keys(  # beside Detectron2's own: DEPTH, NORM, RES5_DILATION, STEM_OUT_CHANNELS, ...
    "MODEL.RESNETS",
    STEM_TYPE=setting(
        "basic",
        f"Of {NAME}. basic: a 7x7 convolution | deeplab: three of 3x3, the first two with half of STEM_OUT_CHANNELS.",
        choices=("basic", "deeplab"),
    ),
    RES4_DILATION=setting(
        1, f"Of {NAME}: dilation of res4; 2 takes the place of its stride. RES5_DILATION is 4 then.", choices=(1, 2)
    ),
    CONTRACT_DILATION=setting(
        True, f"Of {NAME}: the first block of a dilated stage has the dilation of the stage before it."
    ),
    DILATE_SECOND_CONV=setting(
        False,
        f"Of {NAME}, depths 18 and 34: the second 3x3 convolution of every block has its stage's dilation too.",
    ),
)


class DeepStem(CNNBlockBase):
    """Three 3x3 convolutions and a 3x3 max pool, stride 4 together (arXiv 1612.01105, section 4.1)."""

    def __init__(self, in_channels: int, out_channels: int, norm: str) -> None:
        """
        Args:
            in_channels: of the images.
            out_channels: of the last convolution; the other two have half of them.
            norm: behind each convolution, by Detectron2's name.
        """
        super().__init__(in_channels, out_channels, stride=4)
        half = out_channels // 2
        self.conv1 = _conv3x3(in_channels, half, norm, stride=2)
        self.conv2 = _conv3x3(half, half, norm)
        self.conv3 = _conv3x3(half, out_channels, norm)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H / 4, W / 4)."""
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu_(conv(x))
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class DilatedBasicBlock(CNNBlockBase):
    """Detectron2's BasicBlock, with a dilation of each of its two 3x3 convolutions."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        norm: str = "BN",
        dilation: int = 1,
        second_dilation: int = 1,
    ) -> None:
        """
        Args:
            in_channels, out_channels: of the block; a 1x1 convolution is its shortcut where they differ.
            stride: of the first convolution.
            norm: behind each convolution, by Detectron2's name.
            dilation, second_dilation: of the first and the second convolution.
        """
        super().__init__(in_channels, out_channels, stride)
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = Conv2d(
                in_channels, out_channels, 1, stride=stride, bias=False, norm=get_norm(norm, out_channels)
            )
            weight_init.c2_msra_fill(self.shortcut)
        self.conv1 = _conv3x3(in_channels, out_channels, norm, stride, dilation)
        self.conv2 = _conv3x3(out_channels, out_channels, norm, dilation=second_dilation)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        out = self.conv2(F.relu_(self.conv1(x)))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class StageGeometry(NamedTuple):
    """Stride of a stage's first block, and the dilation of each of its blocks."""

    stride: int
    dilations: list[int]


def stage_geometries(
    blocks: Sequence[int], res4_dilation: int, res5_dilation: int, contract: bool = True
) -> list[StageGeometry]:
    """Returns the geometry of res2 to res5; a stage whose dilation grows has no stride.

    Args:
        blocks: of each stage.
        res4_dilation, res5_dilation: of these stages; of the others it is 1.
        contract: the first block of a stage whose dilation grows has still that of the stage before.
    """
    stages = [StageGeometry(1, [1] * blocks[0])]
    before = 1
    for count, dilation in zip(blocks[1:], (1, res4_dilation, res5_dilation)):
        grows = dilation > before
        first = before if grows and contract else dilation
        stages.append(StageGeometry(1 if grows else 2, [first] + [dilation] * (count - 1)))
        before = dilation
    return stages


def build_dilated_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Detectron2's ResNet with dilated res4 and res5, an output stride of 8 (or 16), and a deep stem.

    With STEM_TYPE deeplab, RES4_DILATION 2 and RES5_DILATION 4 it is the "ResNet-v1c" of DeepLabV3 (arXiv 1706.05587,
    section 3) and PSPNet as they are trained on Cityscapes. Reads MODEL.RESNETS and MODEL.BACKBONE.FREEZE_AT.
    """
    node = cfg.MODEL.RESNETS
    make_stem = DeepStem if node.STEM_TYPE == "deeplab" else BasicStem
    stem = make_stem(in_channels=input_shape.channels, out_channels=node.STEM_OUT_CHANNELS, norm=node.NORM)
    blocks = _BLOCKS[node.DEPTH]
    geometries = stage_geometries(blocks, node.RES4_DILATION, node.RES5_DILATION, node.CONTRACT_DILATION)
    stages, in_channels = [], node.STEM_OUT_CHANNELS
    for number, (stride, dilations) in enumerate(geometries):
        strides = [stride] + [1] * (len(dilations) - 1)
        out_channels = node.RES2_OUT_CHANNELS << number
        shape = {"in_channels": in_channels, "out_channels": out_channels, "norm": node.NORM}
        if node.DEPTH >= 50:
            stage = ResNet.make_stage(
                BottleneckBlock,
                len(dilations),
                stride_per_block=strides,
                dilation_per_block=dilations,
                bottleneck_channels=node.NUM_GROUPS * node.WIDTH_PER_GROUP << number,
                num_groups=node.NUM_GROUPS,
                stride_in_1x1=node.STRIDE_IN_1X1,
                **shape,
            )
        else:
            stage = ResNet.make_stage(
                DilatedBasicBlock,
                len(dilations),
                stride_per_block=strides,
                dilation_per_block=dilations,
                second_dilation=dilations[-1] if node.DILATE_SECOND_CONV else 1,
                **shape,
            )
        stages.append(stage)
        in_channels = out_channels
    return ResNet(stem, stages, out_features=node.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)


def _conv3x3(in_channels: int, out_channels: int, norm: str, stride: int = 1, dilation: int = 1) -> Conv2d:
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=3,
        stride=stride,
        padding=dilation,
        dilation=dilation,
        bias=False,
        norm=get_norm(norm, out_channels),
    )
    weight_init.c2_msra_fill(conv)
    return conv


@config_check
def check_dilated_resnet(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: dilations that no stride makes room for, parts that this backbone lacks, or its keys with another
            ResNet.
    """
    node = cfg.MODEL.RESNETS
    if cfg.MODEL.BACKBONE.NAME != NAME:
        if cfg.MODEL.BACKBONE.NAME in RESNETS:
            _check_unused(cfg)
        return
    allowed = (4,) if node.RES4_DILATION == 2 else (1, 2)
    if node.RES5_DILATION not in allowed:
        raise ConfigError(
            f"MODEL.RESNETS.RES5_DILATION is {node.RES5_DILATION}; it must be {' or '.join(map(str, allowed))} with "
            f"RES4_DILATION {node.RES4_DILATION}."
        )
    if any(node.DEFORM_ON_PER_STAGE):
        raise ConfigError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE is {list(node.DEFORM_ON_PER_STAGE)}; {NAME} has no deformable blocks."
        )
    if node.STEM_TYPE == "deeplab" and node.STEM_OUT_CHANNELS % 2:
        raise ConfigError(
            f"MODEL.RESNETS.STEM_OUT_CHANNELS is {node.STEM_OUT_CHANNELS}; it must be even with STEM_TYPE deeplab."
        )
    if node.DEPTH < 50 and node.NUM_GROUPS != 1:
        raise ConfigError(f"MODEL.RESNETS.NUM_GROUPS is {node.NUM_GROUPS}; it must be 1 with DEPTH {node.DEPTH}.")


def _check_unused(cfg: CfgNode) -> None:
    unused = {"STEM_TYPE": "basic", "RES4_DILATION": 1, "CONTRACT_DILATION": True, "DILATE_SECOND_CONV": False}
    for key, default in unused.items():
        value = get_key(cfg, f"MODEL.RESNETS.{key}", default)
        if value != default:
            raise ConfigError(
                f"MODEL.RESNETS.{key} is {value!r}, which has no effect with MODEL.BACKBONE.NAME "
                f"{cfg.MODEL.BACKBONE.NAME}: set that to {NAME}."
            )


if NAME not in BACKBONE_REGISTRY:
    BACKBONE_REGISTRY.register(build_dilated_resnet_backbone)
