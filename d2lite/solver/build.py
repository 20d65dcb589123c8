"""From the SOLVER node of the config to an optimizer and its learning-rate schedule."""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler, ParamScheduler
from torch import nn

from d2lite.config import CfgNode
from d2lite.solver.gradient_clipping import GradientClipType, maybe_add_gradient_clipping
from d2lite.solver.lr_scheduler import LRMultiplier, LRScheduler, WarmupParamScheduler

__all__ = [
    "GradientClipType",
    "build_lr_scheduler",
    "build_optimizer",
    "get_default_optimizer_params",
    "maybe_add_gradient_clipping",
]

logger = logging.getLogger(__name__)

NORM_MODULES = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Builds SGD with the per-parameter rules and the gradient clipping of `cfg.SOLVER`.

    Args:
        cfg: reads `SOLVER.{BASE_LR, MOMENTUM, NESTEROV, WEIGHT_DECAY*, BIAS_LR_FACTOR, CLIP_GRADIENTS}`.
        model: its trainable parameters are optimized, each once.

    Returns:
        SGD with one parameter group per distinct set of hyperparameters.
    """
    solver = cfg.SOLVER
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    if not groups:
        raise ValueError("The model has no trainable parameter; check where requires_grad is switched off.")
    optimizer = torch.optim.SGD(
        groups,
        lr=solver.BASE_LR,
        momentum=solver.MOMENTUM,
        nesterov=solver.NESTEROV,
        weight_decay=solver.WEIGHT_DECAY,
    )
    return maybe_add_gradient_clipping(cfg, optimizer)


def get_default_optimizer_params(
    model: nn.Module,
    base_lr: float | None = None,
    weight_decay: float | None = None,
    weight_decay_norm: float | None = None,
    bias_lr_factor: float | None = 1.0,
    weight_decay_bias: float | None = None,
    lr_factor_func: Callable[[str], float] | None = None,
    overrides: dict[str, dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Sorts the trainable parameters of a model into groups for any `torch.optim` optimizer.

    The rules apply in this order, later ones win: `base_lr` and `weight_decay`; `weight_decay_norm`;
    `lr_factor_func`; `overrides` (which the two bias arguments are short for).

    Args:
        model: parameters that are shared between modules are taken once, frozen ones are left out.
        base_lr: learning rate; None leaves it to the optimizer.
        weight_decay: weight decay; None leaves it to the optimizer.
        weight_decay_norm: weight decay of the parameters of normalization layers.
        bias_lr_factor: multiplies `base_lr` for parameters named "bias".
        weight_decay_bias: weight decay for parameters named "bias".
        lr_factor_func: maps a full parameter name to a factor on `base_lr`.
        overrides: last component of a parameter name -> hyperparameters, such as `{"bias": {"lr": 0.1}}`.

    Returns:
        One `{"params": [...], hyperparameter: value, ...}` per distinct set of hyperparameters.

    Raises:
        ValueError: if a learning-rate factor is given without `base_lr`, or bias rules are given twice.
    """
    if lr_factor_func is not None and base_lr is None:
        raise ValueError("lr_factor_func scales base_lr, but base_lr is not given.")
    defaults = _drop_none(lr=base_lr, weight_decay=weight_decay)
    overrides = _add_bias_rules(dict(overrides or {}), base_lr, bias_lr_factor, weight_decay_bias)

    groups: list[tuple[dict[str, Any], list[nn.Parameter]]] = []
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            if not param.requires_grad or param in seen:
                continue
            seen.add(param)
            hyper = dict(defaults)
            if weight_decay_norm is not None and isinstance(module, NORM_MODULES):
                hyper["weight_decay"] = weight_decay_norm
            if lr_factor_func is not None:
                hyper["lr"] *= lr_factor_func(f"{module_name}.{name}" if module_name else name)
            hyper.update(overrides.get(name, {}))
            _add_to_group(groups, hyper, param)
    return [{"params": params, **hyper} for hyper, params in groups]


def _drop_none(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _add_bias_rules(
    overrides: dict[str, dict[str, Any]],
    base_lr: float | None,
    lr_factor: float | None,
    weight_decay: float | None,
) -> dict[str, dict[str, Any]]:
    bias: dict[str, Any] = _drop_none(weight_decay=weight_decay)
    if lr_factor is not None and lr_factor != 1.0:
        if base_lr is None:
            raise ValueError("bias_lr_factor scales base_lr, but base_lr is not given.")
        bias["lr"] = base_lr * lr_factor
    if not bias:
        return overrides
    if "bias" in overrides:
        raise ValueError(
            "Conflicting rules for parameters named 'bias': overrides['bias'], and bias_lr_factor or "
            "weight_decay_bias. Give one of them."
        )
    return {**overrides, "bias": bias}


def _add_to_group(
    groups: list[tuple[dict[str, Any], list[nn.Parameter]]], hyper: dict[str, Any], param: nn.Parameter
) -> None:
    for group_hyper, params in groups:
        if group_hyper == hyper:
            params.append(param)
            return
    groups.append((hyper, [param]))


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Builds the schedule named by `SOLVER.LR_SCHEDULER_NAME`, with warmup, to be stepped once per iteration.

    Args:
        cfg: `SOLVER.LR_SCHEDULER_NAME` is WarmupMultiStepLR, WarmupCosineLR or WarmupStepWithFixedGammaLR.
        optimizer: its present learning rates are the base that the schedule multiplies.

    Raises:
        ValueError: if the name is unknown or `BASE_LR_END` is not between 0 and `BASE_LR`.
    """
    name = cfg.SOLVER.LR_SCHEDULER_NAME
    if name not in _SCHEDULES:
        raise ValueError(f"Unknown SOLVER.LR_SCHEDULER_NAME '{name}'; known are {', '.join(_SCHEDULES)}.")
    max_iter = cfg.SOLVER.MAX_ITER
    schedule = WarmupParamScheduler(
        _SCHEDULES[name](cfg.SOLVER),
        cfg.SOLVER.WARMUP_FACTOR,
        min(cfg.SOLVER.WARMUP_ITERS / max_iter, 1.0),
        cfg.SOLVER.WARMUP_METHOD,
        cfg.SOLVER.RESCALE_INTERVAL,
    )
    return LRMultiplier(optimizer, multiplier=schedule, max_iter=max_iter)


def _multi_step(solver: CfgNode) -> ParamScheduler:
    steps = [step for step in solver.STEPS if step < solver.MAX_ITER]
    if len(steps) != len(solver.STEPS):
        logger.warning("SOLVER.STEPS %s: those not below MAX_ITER %d have no effect.", solver.STEPS, solver.MAX_ITER)
    return MultiStepParamScheduler(
        values=[solver.GAMMA**k for k in range(len(steps) + 1)], milestones=steps, num_updates=solver.MAX_ITER
    )


def _cosine(solver: CfgNode) -> ParamScheduler:
    if not 0.0 <= solver.BASE_LR_END <= solver.BASE_LR:
        raise ValueError(f"SOLVER.BASE_LR_END is {solver.BASE_LR_END}, not between 0 and BASE_LR ({solver.BASE_LR}).")
    return CosineParamScheduler(1.0, solver.BASE_LR_END / solver.BASE_LR)


def _fixed_gamma(solver: CfgNode) -> ParamScheduler:
    # fvcore's scheduler for equal steps has no value at the very end, which the step after the last
    # iteration needs; the same steps as milestones have one.
    parts, total = solver.NUM_DECAYS + 1, solver.MAX_ITER
    return MultiStepParamScheduler(
        values=[solver.GAMMA**k for k in range(parts)],
        milestones=[math.ceil(k * total / parts) for k in range(1, parts)],
        num_updates=total,
    )


_SCHEDULES: dict[str, Callable[[CfgNode], ParamScheduler]] = {
    "WarmupMultiStepLR": _multi_step,
    "WarmupCosineLR": _cosine,
    "WarmupStepWithFixedGammaLR": _fixed_gamma,
}
