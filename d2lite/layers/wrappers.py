"""Thin layers over PyTorch's own, and small tensor helpers that handle empty input."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2lite.layers.batch_norm import FrozenBatchNorm2d

BatchNorm2d, ConvTranspose2d, Linear, interpolate = nn.BatchNorm2d, nn.ConvTranspose2d, nn.Linear, F.interpolate


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` followed by an optional normalization and an optional activation.

    Args:
        norm: module applied to the output of the convolution, stored as `self.norm`.
        activation: callable applied last, e.g. `F.relu`.
        *args, **kwargs: as for `torch.nn.Conv2d`.
    """

    def __init__(
        self,
        *args: Any,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W'); N may be 0."""
        out = self._conv_forward(x, self.weight, self.bias)
        if not torch.jit.is_scripting():
            out = self._normalize(out)
        elif self.norm is not None:
            out = self.norm(out)
        return out if self.activation is None else self.activation(out)

    def _normalize(self, out: Tensor) -> Tensor:
        if type(self.norm) is FrozenBatchNorm2d:
            return self.norm(out, inplace=True)  # nobody else has it, and no convolution needs it to go backward
        return out if self.norm is None else self.norm(out)


def cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """`torch.cat` that returns a single tensor as it is instead of copying it."""
    if not isinstance(tensors, (list, tuple)):
        raise AssertionError(f"cat() needs a list or tuple of tensors, got {type(tensors).__name__}")
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def empty_input_loss_func_wrapper(loss_func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes the mean of `loss_func` over zero targets 0 (and still differentiable) instead of NaN."""

    def wrapped_loss_func(input: Tensor, target: Tensor, *, reduction: str = "mean", **kwargs: Any) -> Tensor:
        no_mean = reduction == "mean" and target.numel() == 0
        return input.sum() * 0.0 if no_mean else loss_func(input, target, reduction=reduction, **kwargs)

    return wrapped_loss_func


cross_entropy = empty_input_loss_func_wrapper(F.cross_entropy)


def nonzero_tuple(x: Tensor) -> tuple[Tensor, ...]:
    """Index tensors of the non-zero elements, one per dimension; a 0-d tensor counts as 1-d."""
    return torch.atleast_1d(x).nonzero(as_tuple=True)


def shapes_to_tensor(x: list[int], device: torch.device | None = None) -> Tensor:
    """Turns a list of sizes into an integer tensor of shape (len(x),) on `device`."""
    return torch.tensor(x, device=device)


def move_device_like(src: Tensor, dst: Tensor) -> Tensor:
    """Returns `src` on the device of `dst`."""
    return src.to(dst.device)
