"""Optimizers: Detectron2's SGD, Adam and AdamW with its per-parameter rules, clipping by the whole model's norm."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from d2kd.config import with_values
from d2kd.errors import ConfigError, require_choice
from d2kd.modeling import DistilledModel
from d2kd.modeling.backbone import layer_decay_factors
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_sgd
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping

FULL_MODEL = "full_model"
#: With Adam the weight decay is part of the gradient (L2), with AdamW it is not.
_ADAPTIVE = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """The optimizer of `cfg.SOLVER` over the trainable parameters of `model` (the student, and the distillers).

    What the default recipe sets, such as clipping, counts (`DistilledModel.recipe`); also within
    `DistributedDataParallel`.

    Raises:
        ConfigError: `SOLVER.OPTIMIZER` is unknown, or `SOLVER.LAYER_DECAY` does not fit optimizer or model.
    """
    if isinstance(model, DistributedDataParallel):  # names are those of what it wraps
        model = model.module
    if isinstance(model, DistilledModel):
        cfg = with_values(cfg, model.recipe)
        optimizer = _build(cfg, model)
        _slow_down(optimizer, model, cfg.DISTILL.INIT_FROM_TEACHER.LR_FACTOR)
        return optimizer
    return _build(cfg, model)


def _build(cfg: CfgNode, model: nn.Module) -> Optimizer:
    full_model = cfg.SOLVER.CLIP_GRADIENTS.ENABLED and cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE == FULL_MODEL
    if full_model:
        optimizer = _build_unclipped(with_values(cfg, {"SOLVER.CLIP_GRADIENTS.ENABLED": False}), model)
        clip_by_total_norm(optimizer, cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE, cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE)
        return optimizer
    return _build_unclipped(cfg, model)


def _build_unclipped(cfg: CfgNode, model: nn.Module) -> Optimizer:
    name = cfg.SOLVER.OPTIMIZER
    require_choice("SOLVER.OPTIMIZER", name, ("SGD", *_ADAPTIVE))
    if name == "SGD":
        if cfg.SOLVER.LAYER_DECAY != 1.0:
            raise ConfigError(f"SOLVER.LAYER_DECAY is {cfg.SOLVER.LAYER_DECAY}; it needs SOLVER.OPTIMIZER AdamW.")
        return build_sgd(cfg, model)
    params = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        lr_factor_func=_layer_decay(cfg, model),
        # positions and class tokens of a vision transformer must not shrink (arXiv 2203.16527, appendix A.2)
        overrides={name: {"weight_decay": 0.0} for name in ("pos_embed", "cls_token", "dist_token")},
    )
    kind: Callable[..., Optimizer] = maybe_add_gradient_clipping(cfg, _ADAPTIVE[name])
    return kind(params, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)


def _layer_decay(cfg: CfgNode, model: nn.Module) -> Callable[[str], float] | None:
    """Factor on the learning rate by parameter name; None where `SOLVER.LAYER_DECAY` is off."""
    decay = cfg.SOLVER.LAYER_DECAY
    if decay == 1.0:
        return None
    if not 0.0 < decay < 1.0:
        raise ConfigError(f"SOLVER.LAYER_DECAY is {decay}; it must be above 0 and at most 1.")

    factor = layer_decay_factors(cfg, model)
    if factor is None or all(factor(name) == 1.0 for name, _ in model.named_parameters()):
        raise ConfigError(
            "SOLVER.LAYER_DECAY is set, but the backbone is neither a vision transformer nor a network of timm: set it "
            "to 1.0."
        )
    return factor


def _slow_down(optimizer: Optimizer, model: DistilledModel, factor: float) -> None:
    """Gives what the student has from its teacher a learning rate of its own (`INIT_FROM_TEACHER.LR_FACTOR`)."""
    if factor == 1.0:
        return
    parameters = list(model.student.named_parameters())
    # a bias beside a weight of another shape starts as the teacher's too, but its layer has to be learned
    own = {name.rpartition(".")[0] for name, _ in parameters if name not in model.initialized}
    taken = {id(p) for name, p in parameters if name.rpartition(".")[0] not in own}
    for group in list(optimizer.param_groups):
        slow = [p for p in group["params"] if id(p) in taken]
        group["params"] = [p for p in group["params"] if id(p) not in taken]
        if slow:
            optimizer.add_param_group({**group, "params": slow, "lr": group["lr"] * factor})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def clip_by_total_norm(optimizer: Optimizer, max_norm: float, norm_type: float = 2.0) -> None:
    """Makes every step of an optimizer scale its gradients down to a total norm of at most `max_norm`."""
    parameters: list[nn.Parameter] = list(itertools.chain.from_iterable(g["params"] for g in optimizer.param_groups))

    def clip(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

    optimizer.register_step_pre_hook(clip)
