"""Layers whose operators no exporter knows, written with those that all know, while a network is traced."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from detectron2.layers import DeformConv, ModulatedDeformConv


@contextlib.contextmanager
def graph_layers(network: nn.Module) -> Iterator[None]:
    """Lets deformable convolutions (arXiv 1703.06211, 1811.11168) of a network run as `deformed`, and pooling to a
    grid as `averaged`.
    """
    layers = [x for x in network.modules() if isinstance(x, (DeformConv, ModulatedDeformConv))]
    for layer in layers:
        layer.forward = functools.partial(_deformable, layer)
    try:
        with _GraphFunctions():
            yield
    finally:
        for layer in layers:
            del layer.forward  # the method of its class is there again


class _GraphFunctions(TorchFunctionMode):
    """Calls `averaged` for pooling to a grid, wherever that is done."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (averaged if func is F.adaptive_avg_pool2d else func)(*args, **(kwargs or {}))


def averaged(x: Tensor, output_size: Any) -> Tensor:
    """`F.adaptive_avg_pool2d`, (N, C, H, W) to (N, C, *output_size), as two products of matrices.

    ONNX's operator has windows of one size, which these are only where the grid divides the map.
    """
    rows, columns = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
    if rows == columns == 1:
        return x.mean(dim=(2, 3), keepdim=True)
    return _windows(x, 2, rows) @ x @ _windows(x, 3, columns).transpose(0, 1)


def _windows(x: Tensor, axis: int, number: Any) -> Tensor:
    """Share (number, length) of every position along an axis in windows, which overlap where they do not divide it."""
    length, number = x.shape[axis], x.shape[axis] if number is None else int(number)
    window = torch.arange(number, device=x.device)[:, None]
    start = torch.div(window * length, number, rounding_mode="floor")
    end = torch.div((window + 1) * length + number - 1, number, rounding_mode="floor")
    position = torch.arange(length, device=x.device)
    inside = ((position >= start) & (position < end)).to(x.dtype)
    return inside / inside.sum(1, keepdim=True)


def _deformable(layer: Any, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
    found = deformed(layer, x, offset, mask)
    if layer.norm is not None:
        found = layer.norm(found)
    return found if layer.activation is None else layer.activation(found)


def deformed(layer: Any, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
    """A deformable convolution as one bilinear sampling and one product of matrices.

    Args:
        layer: Detectron2's `DeformConv` or `ModulatedDeformConv`.
        x: (N, C, H, W).
        offset: (N, 2 * G * T, H', W') y and x of T taps in each of G deformable groups, in pixels.
        mask: (N, G * T, H', W'), weights of the taps.

    Returns:
        (N, C', H', W'), in the weights' precision.
    """
    groups, taps, dtype = layer.deformable_groups, layer.kernel_size[0] * layer.kernel_size[1], layer.weight.dtype
    stride, padding, dilation = (_pair(x) for x in (layer.stride, layer.padding, layer.dilation))
    n, (height, width), size = x.shape[0], x.shape[2:], offset.shape[2:]
    steps = [torch.arange(k, dtype=torch.float32, device=x.device) for k in layer.kernel_size]
    tap = torch.meshgrid(*steps, indexing="ij")
    moved = offset.float().reshape(n * groups, taps, 2, size[0], size[1])
    places = []
    for axis, length in ((1, width), (0, height)):  # x before y, from -1 to 1 between the outer edges
        start = (tap[axis].flatten() * dilation[axis] - padding[axis])[:, None, None]
        position = torch.arange(size[axis], dtype=torch.float32, device=x.device) * stride[axis]
        where = start + (position[:, None] if axis == 0 else position) + moved[:, :, axis]
        places.append((2 * where + 1) / length - 1)
    grid = torch.stack(places, dim=-1).flatten(1, 2)
    maps = x.float().reshape(n * groups, -1, height, width)
    sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    if mask is not None:
        sampled = sampled * mask.float().reshape(n * groups, 1, -1, size[1])
    channels, weight = layer.weight.shape[1], layer.weight.float()
    columns = sampled.reshape(n, layer.groups, channels * taps, -1)
    kernels = weight.reshape(layer.groups, -1, channels * taps)
    found = (kernels @ columns).reshape(n, -1, size[0], size[1])
    bias = getattr(layer, "bias", None)
    return (found if bias is None else found + bias.float()[:, None, None]).to(dtype)


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))
