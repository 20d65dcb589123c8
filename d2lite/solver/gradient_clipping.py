"""Gradient clipping per parameter, as part of the optimizer's step, for any torch optimizer."""

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any, TypeVar

import torch

from d2lite.config import CfgNode

Clip = Callable[[list[torch.Tensor]], None]
OptimizerOrClass = TypeVar("OptimizerOrClass", torch.optim.Optimizer, type[torch.optim.Optimizer])


class GradientClipType(Enum):
    """Values of `SOLVER.CLIP_GRADIENTS.CLIP_TYPE`."""

    VALUE = "value"
    NORM = "norm"


def maybe_add_gradient_clipping(cfg: CfgNode, optimizer: OptimizerOrClass) -> OptimizerOrClass:
    """Makes an optimizer clip every parameter's gradient before it steps, if `SOLVER.CLIP_GRADIENTS.ENABLED`.

    Under mixed precision the gradients are unscaled before `step` is called, so true gradients are clipped.

    Args:
        cfg: reads `SOLVER.CLIP_GRADIENTS.{ENABLED, CLIP_TYPE, CLIP_VALUE, NORM_TYPE}`.
        optimizer: an optimizer, changed in place, or an optimizer class, which is subclassed.

    Returns:
        The optimizer or class; its class name gains the ending "WithGradientClip". Instances can be pickled.
    """
    if not cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
        return optimizer
    clip = _build_clip(cfg.SOLVER.CLIP_GRADIENTS)
    if isinstance(optimizer, type):
        return _clipping_class(optimizer, clip)
    optimizer.__class__ = _clipping_class(type(optimizer), clip)
    return optimizer


def _build_clip(options: CfgNode) -> Clip:
    try:
        clip_type = GradientClipType(options.CLIP_TYPE)
    except ValueError:
        known = ", ".join(member.value for member in GradientClipType)
        message = f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is '{options.CLIP_TYPE}'; known are {known}."
        raise ValueError(message) from None
    if clip_type is GradientClipType.VALUE:
        return partial(clip_each_value_, limit=options.CLIP_VALUE)
    return partial(clip_each_norm_, limit=options.CLIP_VALUE, norm_type=options.NORM_TYPE)


def clip_each_value_(grads: list[torch.Tensor], limit: float) -> None:
    """Clamps every element of every gradient to [-limit, limit], in place."""
    torch._foreach_clamp_min_(grads, -limit)
    torch._foreach_clamp_max_(grads, limit)


def clip_each_norm_(grads: list[torch.Tensor], limit: float, norm_type: float) -> None:
    """Scales every gradient whose own norm is above `limit` down to it, in place."""
    factors = torch._foreach_norm(grads, norm_type)
    torch._foreach_add_(factors, 1e-6)
    torch._foreach_reciprocal_(factors)
    torch._foreach_mul_(factors, limit)
    torch._foreach_clamp_max_(factors, 1.0)
    torch._foreach_mul_(grads, factors)


class _ClippingStep:
    """Mixin that clips before the step of the optimizer class after it."""

    _base: type[torch.optim.Optimizer]
    _clip: Clip

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is None:
            self._clip_gradients()
            return super().step()

        def clipped_closure() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._clip_gradients()
            return loss

        return super().step(clipped_closure)

    # The base class's step runs the optimizer's hooks; without the mark they would run here as well.
    step.hooked = True

    @torch.no_grad()
    def _clip_gradients(self) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if grads:
            type(self)._clip(grads)

    def __reduce__(self) -> tuple:
        # The class is made at run time, so pickle cannot find it by name.
        return _new_clipping_optimizer, (self._base, type(self)._clip), self.__getstate__()


def _clipping_class(base: type[torch.optim.Optimizer], clip: Clip) -> type[torch.optim.Optimizer]:
    members = {"_base": base, "_clip": staticmethod(clip)}
    return type(f"{base.__name__}WithGradientClip", (_ClippingStep, base), members)


def _new_clipping_optimizer(base: type[torch.optim.Optimizer], clip: Clip) -> torch.optim.Optimizer:
    cls = _clipping_class(base, clip)
    return cls.__new__(cls)
