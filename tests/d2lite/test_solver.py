"""Optimizer groups, gradient clipping and learning-rate schedules, beyond the recorded cases."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler
from torch import nn

from d2lite.config import get_cfg
from d2lite.solver import (
    LRMultiplier,
    WarmupCosineLR,
    WarmupMultiStepLR,
    WarmupParamScheduler,
    build_lr_scheduler,
    build_optimizer,
    get_default_optimizer_params,
    maybe_add_gradient_clipping,
)


def clipping_cfg(clip_type, value, norm_type=2.0):
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = clip_type
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = value
    cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE = norm_type
    return cfg


def params_with_grads():
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(7)), nn.Parameter(torch.zeros(2))]
    for scale, p in zip((10.0, 0.01), params):
        p.grad = scale * torch.randn_like(p)
    return params


OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.Adam(p, lr=0.1),
    lambda p: torch.optim.AdamW(p, lr=0.1),
    lambda p: torch.optim.RMSprop(p, lr=0.1),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize(
    ("clip_type", "reference"),
    [
        ("value", lambda p: nn.utils.clip_grad_value_([p], 0.3)),
        ("norm", lambda p: nn.utils.clip_grad_norm_([p], 0.3)),
    ],
)
def test_clipping_equals_torchs_own_per_parameter_for_any_optimizer(make, clip_type, reference):
    clipped, plain = params_with_grads(), params_with_grads()
    optimizer = maybe_add_gradient_clipping(clipping_cfg(clip_type, 0.3), make(clipped))
    other = make(plain)
    for _ in range(3):
        for p, q in zip(clipped[:2], plain):
            p.grad, q.grad = p.grad * 2, q.grad * 2
            reference(q)
        optimizer.step()
        other.step()
    for p, q in zip(clipped, plain):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("norm_type", [1.0, 3.0, math.inf])
def test_clipping_by_other_norms(norm_type):
    params = params_with_grads()
    before = params[1].grad.clone()
    optimizer = torch.optim.SGD(params, lr=0.0)
    maybe_add_gradient_clipping(clipping_cfg("norm", 0.5, norm_type), optimizer).step()
    assert torch.linalg.vector_norm(params[0].grad, norm_type).item() == pytest.approx(0.5, rel=1e-4)
    assert torch.equal(params[1].grad, before), "a small gradient must stay as it is"


def test_clipping_an_optimizer_class():
    cls = maybe_add_gradient_clipping(clipping_cfg("value", 0.1), torch.optim.SGD)
    assert issubclass(cls, torch.optim.SGD) and cls.__name__ == "SGDWithGradientClip"
    p = nn.Parameter(torch.zeros(1))
    p.grad = torch.tensor([5.0])
    cls([p], lr=1.0).step()
    assert p.item() == pytest.approx(-0.1)


@pytest.mark.parametrize("copier", [lambda o: pickle.loads(pickle.dumps(o)), copy.deepcopy])
def test_clipping_survives_pickling_and_copying(copier):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.5)
    optimizer = maybe_add_gradient_clipping(clipping_cfg("value", 0.1), optimizer)
    optimizer.param_groups[0]["params"][0].grad = torch.tensor([5.0])
    optimizer.step()
    twin = copier(optimizer)
    assert type(twin).__name__ == "SGDWithGradientClip" and isinstance(twin, torch.optim.SGD)
    p = twin.param_groups[0]["params"][0]
    p.grad = torch.tensor([5.0])
    twin.step()
    assert p.item() == pytest.approx(-0.1 - 0.15), "clipping and momentum must both have survived"


def test_step_hooks_run_once_and_closures_are_clipped():
    p = nn.Parameter(torch.zeros(1))
    optimizer = maybe_add_gradient_clipping(clipping_cfg("value", 0.1), torch.optim.SGD([p], lr=1.0))
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))

    def closure():
        optimizer.zero_grad()
        loss = 7 * p.sum() + 1
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.0
    assert p.item() == pytest.approx(-0.1)
    assert len(calls) == 1


def test_clipping_is_off_by_default_and_unknown_types_are_named():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    assert type(maybe_add_gradient_clipping(get_cfg(), optimizer)) is torch.optim.SGD
    with pytest.raises(ValueError, match="CLIP_TYPE is 'full_model'; known are value, norm"):
        maybe_add_gradient_clipping(clipping_cfg("full_model", 1.0), optimizer)


def test_every_trainable_parameter_is_in_one_group():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model.append(model[0])
    model[2].weight.requires_grad = False
    groups = get_default_optimizer_params(model, base_lr=0.1, weight_decay=1e-4, weight_decay_norm=0.0)
    found = [p for group in groups for p in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {p for p in model.parameters() if p.requires_grad}
    assert len(groups) == 2


def test_lr_factor_sees_full_names_and_overrides_win():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    names = []
    groups = get_default_optimizer_params(
        model,
        base_lr=1.0,
        lr_factor_func=lambda name: names.append(name) or 0.5,
        overrides={"bias": {"lr": 3.0, "betas": [0.9, 0.99]}},
    )
    assert names == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert [(g["lr"], len(g["params"])) for g in groups] == [(0.5, 2), (3.0, 2)]
    assert groups[1]["betas"] == [0.9, 0.99]


def test_contradicting_rules_are_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Conflicting rules for parameters named 'bias'"):
        get_default_optimizer_params(model, weight_decay_bias=0.0, overrides={"bias": {"lr": 1}})
    with pytest.raises(ValueError, match="base_lr is not given"):
        get_default_optimizer_params(model, bias_lr_factor=2.0)
    with pytest.raises(ValueError, match="base_lr is not given"):
        get_default_optimizer_params(model, lr_factor_func=lambda name: 1.0)


def test_a_frozen_model_is_refused():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(get_cfg(), model)


def learning_rates(scheduler, optimizer, steps):
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates + [optimizer.param_groups[0]["lr"]]


def sgd(lr):
    return torch.optim.SGD([nn.Parameter(torch.zeros(0))], lr=lr)


def test_warmup_then_steps():
    optimizer = sgd(5)
    steps = MultiStepParamScheduler([1, 0.1, 0.01, 0.001], milestones=[10, 15, 20], num_updates=30)
    rates = learning_rates(LRMultiplier(optimizer, WarmupParamScheduler(steps, 0.001, 5 / 30), 30), optimizer, 30)
    assert np.allclose(rates[:5], [0.005, 1.004, 2.003, 3.002, 4.001])
    assert np.allclose(rates[5:10], 5.0)
    assert np.allclose(rates[10:15], 0.5)
    assert np.allclose(rates[15:20], 0.05)
    assert np.allclose(rates[20:], 0.005)


@pytest.mark.parametrize("end", [0.0, 0.5])
def test_warmup_leads_onto_the_cosine(end):
    optimizer = sgd(5)
    scheduler = LRMultiplier(optimizer, WarmupParamScheduler(CosineParamScheduler(1, end), 0.0, 5 / 30), 30)
    rates = learning_rates(scheduler, optimizer, 30)
    cosine = [5 * (end + 0.5 * (1 - end) * (1 + math.cos(math.pi * i / 30))) for i in range(31)]
    assert np.allclose(rates[5:], cosine[5:])
    assert np.allclose(rates[:6], np.linspace(0, cosine[5], 6))


def test_legacy_schedulers():
    optimizer = sgd(5)
    scheduler = WarmupMultiStepLR(optimizer, [10, 15], gamma=0.1, warmup_factor=0.5, warmup_iters=4)
    rates = learning_rates(scheduler, optimizer, 20)
    assert np.allclose(rates[:5], [2.5, 3.125, 3.75, 4.375, 5.0])
    assert np.allclose([rates[9], rates[10], rates[15]], [5.0, 0.5, 0.05])
    optimizer = sgd(2)
    scheduler = WarmupCosineLR(optimizer, 10, warmup_factor=0.25, warmup_iters=2, warmup_method="constant")
    rates = learning_rates(scheduler, optimizer, 10)
    assert rates[0] == pytest.approx(0.5) and rates[5] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="increasing"):
        WarmupMultiStepLR(optimizer, [5, 3])


@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"])
@pytest.mark.parametrize("warmup", [0, 3, 50])
def test_schedules_can_be_stepped_past_the_last_iteration(name, warmup):
    cfg = get_cfg()
    cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS = name, 20, warmup
    optimizer = sgd(cfg.SOLVER.BASE_LR)
    rates = learning_rates(build_lr_scheduler(cfg, optimizer), optimizer, 20)
    assert all(0 <= rate <= cfg.SOLVER.BASE_LR * (1 + 1e-9) for rate in rates)


def test_bad_schedules_are_refused():
    cfg = get_cfg()
    cfg.SOLVER.LR_SCHEDULER_NAME = "Cosine"
    with pytest.raises(ValueError, match="LR_SCHEDULER_NAME 'Cosine'; known are WarmupMultiStepLR"):
        build_lr_scheduler(cfg, sgd(1))
    cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.BASE_LR_END = "WarmupCosineLR", 1.0
    with pytest.raises(ValueError, match="BASE_LR_END"):
        build_lr_scheduler(cfg, sgd(1))
    with pytest.raises(ValueError, match="WARMUP_METHOD 'cubic'"):
        WarmupParamScheduler(CosineParamScheduler(1, 0), 0.1, 0.1, "cubic")
    with pytest.raises(ValueError, match="ParamScheduler, not float"):
        LRMultiplier(sgd(1), 0.5, 10)
