"""Building blocks of residual networks: the stem, and plain, bottleneck and deformable blocks."""

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from torch import Tensor, nn

from d2lite.layers import CNNBlockBase, Conv2d, DeformConv, ModulatedDeformConv, get_norm
from d2lite.layers.batch_norm import Norm


class BasicStem(CNNBlockBase):
    """A 7x7 convolution and a 3x3 max pool, stride 4 together."""

    def __init__(self, in_channels: int = 3, out_channels: int = 64, norm: Norm = "BN") -> None:
        super().__init__(in_channels, out_channels, 4)
        self.conv1 = _conv(in_channels, out_channels, 7, norm, stride=2)
        weight_init.c2_msra_fill(self.conv1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H / 4, W / 4)."""
        return F.max_pool2d(F.relu_(self.conv1(x)), kernel_size=3, stride=2, padding=1)


class BasicBlock(CNNBlockBase):
    """Two 3x3 convolutions beside a shortcut, as in ResNet-18 and -34; the first has the stride."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, norm: Norm = "BN") -> None:
        super().__init__(in_channels, out_channels, stride)
        self.shortcut = _projection(in_channels, out_channels, stride, norm)
        self.conv1 = _conv(in_channels, out_channels, 3, norm, stride=stride)
        self.conv2 = _conv(out_channels, out_channels, 3, norm)
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
        self.conv1 = _conv(in_channels, bottleneck_channels, 1, norm, stride=stride_1x1)
        self.conv2 = _conv(
            bottleneck_channels,
            bottleneck_channels,
            3,
            norm,
            stride=stride_3x3,
            dilation=dilation,
            groups=num_groups,
        )
        self.conv3 = _conv(bottleneck_channels, out_channels, 1, norm)
        _init_convs(self.shortcut, self.conv1, self.conv2, self.conv3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride)."""
        out = F.relu_(self.conv1(x))
        out = F.relu_(self.conv2(out))
        out = self.conv3(out)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class DeformBottleneckBlock(CNNBlockBase):
    """`BottleneckBlock` whose 3x3 convolution is deformable; `conv2_offset` predicts its sampling offsets.

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
        self.conv1 = _conv(in_channels, bottleneck_channels, 1, norm, stride=stride_1x1)
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
        self.conv3 = _conv(bottleneck_channels, out_channels, 1, norm)
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


def _conv(
    in_channels: int, out_channels: int, kernel_size: int, norm: Norm, *, dilation: int = 1, **kwargs: int
) -> Conv2d:
    """A convolution that keeps the size of the map, up to its stride."""
    return Conv2d(
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        padding=kernel_size // 2 * dilation,
        dilation=dilation,
        bias=False,
        norm=get_norm(norm, out_channels),
        **kwargs,
    )


def _projection(in_channels: int, out_channels: int, stride: int, norm: Norm) -> Conv2d | None:
    """The shortcut of a block: nothing where it keeps the number of channels."""
    return None if in_channels == out_channels else _conv(in_channels, out_channels, 1, norm, stride=stride)


def _init_convs(*convs: nn.Module | None) -> None:
    for conv in convs:
        if conv is not None:
            weight_init.c2_msra_fill(conv)
