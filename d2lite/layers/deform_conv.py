"""Deformable convolution v1 (arXiv 1703.06211) and v2 (arXiv 1811.11168), on GPUs by torchvision's operator."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair
from torchvision.ops import deform_conv2d


class _DeformConvBase(nn.Module):
    """Parameters, checks and repr that both versions share."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        groups: int,
        deformable_groups: int,
        bias: bool,
        norm: nn.Module | None,
        activation: Callable[[Tensor], Tensor] | None,
    ) -> None:
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise AssertionError(
                f"groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair(kernel_size)
        self.groups = groups
        self.deformable_groups = deformable_groups
        self.norm = norm
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def _convolve(self, x: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
        self._check_channels("offset", offset, 2)
        if mask is not None:
            self._check_channels("mask", mask, 1)
        operator = _deform_conv2d_on_cpu if x.device.type == "cpu" else deform_conv2d
        x = operator(x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x

    def _check_channels(self, name: str, tensor: Tensor, per_tap: int) -> None:
        want = per_tap * self.deformable_groups * self.kernel_size[0] * self.kernel_size[1]
        if tensor.shape[1] != want:
            raise RuntimeError(
                f"{type(self).__name__}: {name} has {tensor.shape[1]} channels; kernel {self.kernel_size} "
                f"with deformable_groups={self.deformable_groups} needs {want}"
            )

    def extra_repr(self) -> str:
        return (
            f"in_channels={self.in_channels}, out_channels={self.out_channels}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, groups={self.groups}, "
            f"deformable_groups={self.deformable_groups}, bias={self.bias is not None}"
        )


class DeformConv(_DeformConvBase):
    """Deformable convolution: each kernel tap reads at an offset that another layer predicts.

    Args:
        deformable_groups: the input channels are split into this many groups with offsets of their own.
        bias: must be False; accepted for symmetry with other convolutions.
        norm, activation: applied to the output, as in `d2lite.layers.Conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        deformable_groups: int = 1,
        bias: bool = False,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if bias:
            raise AssertionError("DeformConv has no bias; use ModulatedDeformConv for one")
        super().__init__(in_channels, out_channels, kernel_size, groups, deformable_groups, False, norm, activation)
        self.stride, self.padding, self.dilation = _pair(stride), _pair(padding), _pair(dilation)

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """Convolves `x` (N, C, H, W) at `offset` (N, 2 * deformable_groups * kh * kw, H', W'): (dy, dx)."""
        return self._convolve(x, offset, None)


class ModulatedDeformConv(_DeformConvBase):
    """Deformable convolution whose taps a predicted mask weights, too. Arguments as for DeformConv."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        deformable_groups: int = 1,
        bias: bool = True,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, groups, deformable_groups, bias, norm, activation)
        self.stride, self.padding, self.dilation = stride, padding, dilation

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """As in DeformConv; `mask` (N, deformable_groups * kh * kw, H', W') is in [0, 1]."""
        return self._convolve(x, offset, mask)


def _deform_conv2d_on_cpu(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    dilation: int | tuple[int, int],
    mask: Tensor | None,
) -> Tensor:
    """torchvision's `deform_conv2d` as one bilinear sampling and one product of matrices.

    A training step is several times as fast as with the operator on the CPU, which has no half precision either.
    """
    dtype = x.dtype
    if dtype in (torch.float16, torch.bfloat16):
        x, offset, weight = x.float(), offset.float(), weight.float()
    (n, c, h, w), (out_channels, group_channels, *kernel) = x.shape, weight.shape
    taps, (out_h, out_w) = kernel[0] * kernel[1], offset.shape[2:]
    geometry = zip((h, w), kernel, _pair(stride), _pair(padding), _pair(dilation))
    out_size = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in geometry]
    if out_size != [out_h, out_w]:
        raise RuntimeError(f"the offset is of size {out_h} x {out_w}, the output of {out_size[0]} x {out_size[1]}")
    parts = offset.shape[1] // (2 * taps)

    def places(axis: int, size: int, tap: Tensor) -> Tensor:
        """Where the taps are without offsets, along one axis."""
        start = tap * _pair(dilation)[axis] - _pair(padding)[axis]
        return start[:, None] + torch.arange(size, dtype=x.dtype) * _pair(stride)[axis]

    row, column = torch.meshgrid(*(torch.arange(k, dtype=x.dtype) for k in kernel), indexing="ij")
    dy, dx = offset.reshape(n * parts, taps, 2, out_h, out_w).unbind(dim=2)
    grid_y = (2 * (dy + places(0, out_h, row.flatten())[:, :, None]) + 1) / h - 1
    grid_x = (2 * (dx + places(1, out_w, column.flatten())[:, None]) + 1) / w - 1
    grid = torch.stack([grid_x, grid_y], dim=-1).view(n * parts, taps * out_h, out_w, 2)
    sampled = F.grid_sample(x.reshape(n * parts, c // parts, h, w), grid, align_corners=False)
    if mask is not None:
        sampled = sampled * mask.reshape(n * parts, 1, taps * out_h, out_w).to(x.dtype)
    groups = c // group_channels
    columns = sampled.view(n, groups, group_channels * taps, out_h * out_w)
    kernels = weight.view(groups, out_channels // groups, group_channels * taps)
    out = (kernels @ columns).view(n, out_channels, out_h, out_w).to(dtype)
    return out if bias is None else out + bias[:, None, None].to(dtype)
