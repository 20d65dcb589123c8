"""BACKBONE "build_mobilenetv2_backbone": MobileNetV2 (arXiv 1801.04381) with the output stride of segmentation."""

from collections.abc import Sequence
from typing import NamedTuple

from fvcore.nn import weight_init
from torch import Tensor, nn

from d2kd.config import declare_keys
from d2kd.detectron2_keys import NORMS
from d2kd.settings import NOT_EMPTY, setting
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, ResNet

declare_keys(  # BACKBONE.NAME "build_mobilenetv2_backbone"
    "MODEL.MOBILENETV2",
    OUT_FEATURES=setting(
        ["res4", "res5"],
        "Outputs, by the stage of a ResNet that they stand for: res2 (24 channels), res3 (32), res4 (96), res5 (320).",
        rule=NOT_EMPTY,
    ),
    WIDTH=setting(1.0, "Factor on the channels of all layers, which stay multiples of 8.", above=0, at_most=10),
    OUTPUT_STRIDE=setting(
        8, "Pixels per cell of the last output; strides beyond it become dilations.", choices=(8, 16, 32)
    ),
    DILATED_BLOCKS=setting(
        "first",
        "Which blocks a dilation is for. first: the first one of every stage | following: all that come behind a "
        "stride that was taken away, which is what keeps the weights of a classifier valid.",
        choices=("first", "following"),
    ),
    NORM=setting("BN", "Normalization behind each convolution.", choices=NORMS),
)


class _Row(NamedTuple):
    """A row of the paper's table 2."""

    expansion: int
    channels: int
    blocks: int
    stride: int


#: By the output of a ResNet whose stride they have in a classifier.
_ROWS = {
    "res2": (_Row(1, 16, 1, 1), _Row(6, 24, 2, 2)),
    "res3": (_Row(6, 32, 3, 2),),
    "res4": (_Row(6, 64, 4, 2), _Row(6, 96, 3, 1)),
    "res5": (_Row(6, 160, 3, 2), _Row(6, 320, 1, 1)),
}


class MobileStem(CNNBlockBase):
    """A 3x3 convolution of stride 2."""

    def __init__(self, in_channels: int, out_channels: int, norm: str) -> None:
        """
        Args:
            in_channels, out_channels: of the convolution.
            norm: behind it, by Detectron2's name.
        """
        super().__init__(in_channels, out_channels, stride=2)
        self.conv1 = _conv(in_channels, out_channels, norm, kernel_size=3, stride=2, activates=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H / 2, W / 2)."""
        return self.conv1(x)


class InvertedResidual(CNNBlockBase):
    """1x1 expansion, 3x3 depthwise convolution and linear 1x1 projection, added to the input where shapes agree."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expansion: int,
        stride: int = 1,
        dilation: int = 1,
        norm: str = "BN",
    ) -> None:
        """
        Args:
            in_channels, out_channels: of the block.
            expansion: width of the depthwise convolution over the block's input; 1 has no expansion layer.
            stride, dilation: of the depthwise convolution.
            norm: behind each convolution, by Detectron2's name.
        """
        super().__init__(in_channels, out_channels, stride)
        width = in_channels * expansion
        self.expand = None if expansion == 1 else _conv(in_channels, width, norm, activates=True)
        self.depthwise = _conv(
            width, width, norm, kernel_size=3, stride=stride, dilation=dilation, groups=width, activates=True
        )
        self.project = _conv(width, out_channels, norm)
        self.adds = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        out = x if self.expand is None else self.expand(x)
        out = self.project(self.depthwise(out))
        return x + out if self.adds else out


class MobileNetV2(ResNet):
    """MobileNetV2 as Detectron2 has a ResNet: a stem, and stages "res2" to "res5"; without the last 1x1 convolution."""

    def __init__(
        self,
        *,
        in_channels: int = 3,
        width: float = 1.0,
        output_stride: int = 8,
        dilated_blocks: str = "first",
        norm: str = "BN",
        out_features: Sequence[str] = ("res4", "res5"),
        freeze_at: int = 0,
    ) -> None:
        """
        Args:
            in_channels: of the images.
            width, output_stride, dilated_blocks, norm, out_features: see the keys of MODEL.MOBILENETV2.
            freeze_at: as for Detectron2's ResNet.

        Raises:
            AssertionError: there is no feature of that name.
        """
        stem = MobileStem(in_channels, scaled_channels(32, width), norm)
        stages: list[list[CNNBlockBase]] = []
        channels, stride, dilation = stem.out_channels, stem.stride, 1
        for rows in _ROWS.values():
            blocks: list[CNNBlockBase] = []
            for row in rows:
                strides, dilations = _row_geometry(row, stride, dilation, output_stride, dilated_blocks)
                stride, dilation = stride * strides[0], dilation * row.stride // strides[0]
                made = ResNet.make_stage(
                    InvertedResidual,
                    row.blocks,
                    in_channels=channels,
                    out_channels=scaled_channels(row.channels, width),
                    expansion=row.expansion,
                    stride_per_block=strides,
                    dilation_per_block=dilations,
                    norm=norm,
                )
                blocks += made
                channels = made[-1].out_channels
            stages.append(blocks)
        super().__init__(stem, stages, out_features=list(out_features), freeze_at=freeze_at)


def scaled_channels(channels: int, width: float) -> int:
    """Returns channels times width as the nearest multiple of 8, at least 8 and not less than 90 % of the product."""
    wanted = channels * width
    nearest = max(8, int(wanted + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * wanted else nearest + 8


def _row_geometry(
    row: _Row, stride: int, dilation: int, output_stride: int, dilated_blocks: str
) -> tuple[list[int], list[int]]:
    """Strides and dilations of the blocks of a row, where `stride` and `dilation` are those of the row before it."""
    own = row.stride if stride * row.stride <= output_stride else 1
    after = dilation * row.stride // own
    others = row.blocks - 1
    dilations = [after] + [1] * others if dilated_blocks == "first" else [dilation] + [after] * others
    return [own] + [1] * others, dilations


def _conv(
    in_channels: int,
    out_channels: int,
    norm: str,
    *,
    kernel_size: int = 1,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    activates: bool = False,
) -> Conv2d:
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        stride=stride,
        padding=kernel_size // 2 * dilation,
        dilation=dilation,
        groups=groups,
        bias=False,
        norm=get_norm(norm, out_channels),
        activation=nn.ReLU6(inplace=True) if activates else None,
    )
    weight_init.c2_msra_fill(conv)
    return conv


def build_mobilenetv2_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> MobileNetV2:
    """The network of MODEL.MOBILENETV2; also reads MODEL.BACKBONE.FREEZE_AT."""
    node = cfg.MODEL.MOBILENETV2
    return MobileNetV2(
        in_channels=input_shape.channels,
        width=node.WIDTH,
        output_stride=node.OUTPUT_STRIDE,
        dilated_blocks=node.DILATED_BLOCKS,
        norm=node.NORM,
        out_features=node.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


if "build_mobilenetv2_backbone" not in BACKBONE_REGISTRY:
    BACKBONE_REGISTRY.register(build_mobilenetv2_backbone)
