"""Building blocks of residual networks: the stem, and plain, bottleneck and deformable blocks."""

from collections.abc import Callable

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from torch import Tensor, nn

from d2lite.layers import CNNBlockBase, Conv2d, DeformConv, ModulatedDeformConv, get_norm
from d2lite.layers.batch_norm import Norm
from d2lite.layers.stem_pool import stem_pool


class BasicStem(CNNBlockBase):
    """A 7x7 convolution and a 3x3 max pool, stride 4 together."""

    def __init__(self, in_channels: int = 3, out_channels: int = 64, norm: Norm = "BN") -> None:
        super().__init__(in_channels, out_channels, stride=4)
        self.conv1 = _conv(in_channels, out_channels, 7, norm, stride=2)
        _init_convs(self.conv1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H / 4, W / 4)."""
        return stem_pool(F.relu_(self.conv1(x)))


class _ResidualBlock(CNNBlockBase):
    """Convolutions beside a shortcut: `_branch`, which subclasses define, and `shortcut`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Norm) -> None:
        super().__init__(in_channels, out_channels, stride=stride)
        # nothing where the number of channels stays
        projects = in_channels != out_channels
        self.shortcut = _conv(in_channels, out_channels, 1, norm, stride=stride) if projects else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride)."""
        out = self._branch(x)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)

    def _branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class BasicBlock(_ResidualBlock):
    """Two 3x3 convolutions beside a shortcut, as in ResNet-18 and -34; the first has the stride."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, norm: Norm = "BN") -> None:
        super().__init__(in_channels, out_channels, stride, norm)
        self.conv1 = _conv(in_channels, out_channels, 3, norm, stride=stride)
        self.conv2 = _conv(out_channels, out_channels, 3, norm)
        _init_convs(self.shortcut, self.conv1, self.conv2)

    def _branch(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu_(self.conv1(x)))


class BottleneckBlock(_ResidualBlock):
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
        super().__init__(in_channels, out_channels, stride, norm)
        width, (first, second) = bottleneck_channels, (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = _conv(in_channels, width, 1, norm, stride=first)
        self.conv2 = _conv(width, width, 3, norm, stride=second, dilation=dilation, groups=num_groups)
        self.conv3 = _conv(width, out_channels, 1, norm)
        _init_convs(self.shortcut, self.conv1, self.conv2, self.conv3)

    def _branch(self, x: Tensor) -> Tensor:
        return self.conv3(F.relu_(self.conv2(F.relu_(self.conv1(x)))))


class DeformBottleneckBlock(_ResidualBlock):
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
        super().__init__(in_channels, out_channels, stride, norm)
        self.deform_modulated = deform_modulated
        width, (first, second) = bottleneck_channels, (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = _conv(in_channels, width, 1, norm, stride=first)
        per_tap, deform_conv = (3, ModulatedDeformConv) if deform_modulated else (2, DeformConv)
        geometry = dict(stride=second, dilation=dilation)
        self.conv2_offset = Conv2d(width, per_tap * 9 * deform_num_groups, 3, padding=dilation, **geometry)
        groups = dict(groups=num_groups, deformable_groups=deform_num_groups)
        self.conv2 = _conv(width, width, 3, norm, deform_conv, **geometry, **groups)
        self.conv3 = _conv(width, out_channels, 1, norm)
        _init_convs(self.shortcut, self.conv1, self.conv2, self.conv3)
        for parameter in self.conv2_offset.parameters():
            nn.init.zeros_(parameter)

    def _branch(self, x: Tensor) -> Tensor:
        x = F.relu_(self.conv1(x))
        sampling = self.conv2_offset(x)
        if self.deform_modulated:
            coordinates = sampling.shape[1] // 3 * 2
            x = self.conv2(x, sampling[:, :coordinates], sampling[:, coordinates:].sigmoid())
        else:
            x = self.conv2(x, sampling)
        return self.conv3(F.relu_(x))


def _conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    norm: Norm,
    layer: Callable[..., nn.Module] = Conv2d,
    *,
    dilation: int = 1,
    **kwargs: int,
) -> nn.Module:
    """A convolution, of the class `layer`, that keeps the size of the map, up to its stride."""
    kwargs.update(kernel_size=kernel_size, padding=kernel_size // 2 * dilation, dilation=dilation, bias=False)
    return layer(in_channels, out_channels, norm=get_norm(norm, out_channels), **kwargs)


def _init_convs(*convs: nn.Module | None) -> None:
    for conv in convs:
        if conv is not None:
            weight_init.c2_msra_fill(conv)
