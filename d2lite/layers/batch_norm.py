"""Normalization layers, and `get_norm`, which makes them from the name in a config."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fvcore.nn.distributed import differentiable_all_reduce
from torch import Tensor, nn

Norm = str | Callable[[int], nn.Module] | None


def get_norm(norm: Norm, out_channels: int) -> nn.Module | None:
    """Makes the normalization layer called `norm` for `out_channels` channels.

    Args:
        norm: "BN", "SyncBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N", "FrozenBN", "GN" (32 groups) or
            "LN"; a callable that takes the number of channels; "" or None for no layer.

    Raises:
        KeyError: if the name is not one of these.
    """
    if norm is None or norm == "":
        return None
    if not isinstance(norm, str):
        return norm(out_channels)
    if norm not in _NORMS:
        raise KeyError(f"unknown norm {norm!r}; choose one of {', '.join(_NORMS)}, or ''")
    return _NORMS[norm](out_channels)


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine parameters are constants: `y = x * scale + shift`.

    The four tensors are buffers. A state dict without the statistics (old checkpoints had folded them into
    the affine parameters) loads as mean 0 and variance 1.

    Args:
        num_features: channels of the input.
        eps: added to the variance.
    """

    _version = 3

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        # variance + eps is 1: a new layer changes nothing
        start = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0 - eps}
        for name, value in start.items():
            self.register_buffer(name, torch.full((num_features,), value))
        self.register_buffer("num_batches_tracked", tensor=None)

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        """Normalizes (N, C, H, W); the result has the type of `x`.

        Args:
            inplace: `x` may be overwritten; ignored where a hook may have kept it.
        """
        if x.is_cuda and not (torch.is_grad_enabled() and x.requires_grad):
            # one kernel, and the arithmetic of half precision maps in float32
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        scale, shift = self.scale_and_shift()
        scale, shift = scale.to(x.dtype).view(1, -1, 1, 1), shift.to(x.dtype).view(1, -1, 1, 1)
        # Unlike F.batch_norm, none keeps x for the backward pass. addcmul is one kernel instead of two, but is not
        # vectorized on CPUs, where the memory of another large map costs more than the arithmetic.
        if x.is_cuda:
            return torch.addcmul(shift, x, scale)
        return (x.mul_(scale) if inplace and not self._is_watched() else x * scale).add_(shift)

    @torch.jit.unused
    def _is_watched(self) -> bool:
        return bool(self._forward_pre_hooks or self._forward_hooks)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The layer as two (C,) tensors, in float32 or better."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        scale = self.weight.to(dtype) * (self.running_var.to(dtype) + self.eps).rsqrt()
        return scale, self.bias.to(dtype) - self.running_mean.to(dtype) * scale

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        if local_metadata.get("version") is None or local_metadata["version"] < 2:
            state_dict.setdefault(prefix + "running_mean", torch.zeros_like(self.running_mean))
            state_dict.setdefault(prefix + "running_var", torch.ones_like(self.running_var))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        return f"num_features={self.num_features}, eps={self.eps}"

    @classmethod
    def convert_frozen_batchnorm(cls, module: nn.Module) -> nn.Module:
        """Replaces every batch norm in `module` by a frozen one with copies of its tensors.

        Returns:
            `module`, changed in place; or its replacement if it is a batch norm itself. A batch norm that is
            used in several places stays shared.
        """
        return cls._convert(module, {})

    @classmethod
    def _convert(cls, module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
        if module in done:
            return done[module]
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            done[module] = cls._frozen_copy(module)
            return done[module]
        done[module] = module
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = cls._convert(child, done)
        return module

    @classmethod
    def _frozen_copy(cls, module: nn.BatchNorm2d | nn.SyncBatchNorm) -> "FrozenBatchNorm2d":
        frozen = cls(module.num_features, module.eps)
        for name in frozen._buffers:
            value = getattr(module, name)
            if value is not None:
                frozen._buffers[name] = value.detach().clone()
        return frozen.train(module.training)


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, made of differentiable all-reduce; also works on CPU.

    Args:
        stats_mode: "" gives every process the same weight; "N" weights each by the size of its batch, so that
            batches may differ in size and be empty.
        *args, **kwargs: as for `torch.nn.BatchNorm2d`.
    """

    def __init__(self, *args: Any, stats_mode: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if stats_mode not in ("", "N"):
            raise AssertionError(f"stats_mode must be '' or 'N', got {stats_mode!r}")
        self._by_size = stats_mode == "N"

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes (N, C, H, W)."""
        together = self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return self._normalize_together(input) if together else super().forward(input)

    def _normalize_together(self, input: Tensor) -> Tensor:
        x = input.float()
        if self._by_size:
            moments, share = self._moments_by_size(x)
        else:
            if x.shape[0] == 0:
                raise AssertionError("NaiveSyncBatchNorm needs stats_mode='N' for empty batches")
            moments = differentiable_all_reduce(_moments(x)) / dist.get_world_size()
            share = 1.0
        mean, mean_of_square = moments.unbind()
        var = (mean_of_square - mean * mean).clamp(min=0)  # rounding makes it negative where x hardly varies
        if self.track_running_stats:
            for average, new in ((self.running_mean, mean), (self.running_var, var)):
                average += self.momentum * share * (new.detach() - average)
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return torch.addcmul(shift.view(1, -1, 1, 1), x, scale.view(1, -1, 1, 1)).to(input.dtype)

    def _moments_by_size(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Moments (2, C) over all samples, and 1 if there is any sample, else 0."""
        n = x.shape[0]
        local = _moments(x) * n if n else x.new_zeros(2, x.shape[1]) + x.sum()
        count = x.new_full((1,), float(n))
        total = differentiable_all_reduce(torch.cat((local.flatten(), count)))
        return total[:-1].view(2, -1) / total[-1].clamp(min=1), total[-1].detach().clamp(max=1)


def _moments(x: Tensor) -> Tensor:
    """Mean and mean of the squares per channel, (2, C)."""
    return torch.stack((x.mean(dim=(0, 2, 3)), (x * x).mean(dim=(0, 2, 3))))


class CycleBatchNormList(nn.ModuleList):
    """Batch norms with separate statistics and one common affine transform, used in turn.

    A head that runs on several pyramid levels keeps statistics per level this way: call k uses norm
    k modulo `length`.

    Args:
        length: number of statistics.
        bn_class: class of the norms.
        **kwargs: passed to `bn_class`; needs `num_features`.
    """

    def __init__(self, length: int, bn_class: Callable[..., nn.Module] = nn.BatchNorm2d, **kwargs: Any) -> None:
        affine = kwargs.pop("affine", True)
        super().__init__(bn_class(**kwargs, affine=False) for _ in range(length))
        self.weight, self.bias = _identity(self[0].num_features) if affine else (None, None)
        self._calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes (N, C, H, W) with the statistics whose turn it is."""
        x = self[self._calls % len(self)](x)
        self._calls += 1
        if self.weight is None:
            return x
        return torch.addcmul(self.bias.view(1, -1, 1, 1), x, self.weight.view(1, -1, 1, 1))

    def extra_repr(self) -> str:
        return f"affine={self.weight is not None}"


class LayerNorm(nn.Module):
    """Layer norm over the channels of each pixel of (N, C, H, W).

    Args:
        normalized_shape: number of channels.
        eps: added to the variance.
    """

    def __init__(self, normalized_shape: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias = _identity(normalized_shape)
        self.eps = eps
        self.normalized_shape = (normalized_shape,)

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes (N, C, H, W)."""
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape[0]}, eps={self.eps}"


def _identity(channels: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of an affine transform that changes nothing yet."""
    return nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))


_NORMS: dict[str, Callable[[int], nn.Module]] = dict(
    BN=nn.BatchNorm2d,
    SyncBN=nn.SyncBatchNorm,
    nnSyncBN=nn.SyncBatchNorm,
    naiveSyncBN=NaiveSyncBatchNorm,
    naiveSyncBN_N=partial(NaiveSyncBatchNorm, stats_mode="N"),
    FrozenBN=FrozenBatchNorm2d,
    GN=partial(nn.GroupNorm, 32),
    LN=LayerNorm,
)
