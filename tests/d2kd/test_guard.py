"""The guard of methods that oppose the task, and the ratio as a limit."""

import logging
import math

import pytest
import torch
from models import config

from d2kd.engine.scaling import scale_to_processes
from d2kd.modeling import GradientBalance
from d2kd.modeling.guard import GradientGuard
from detectron2.utils.events import EventStorage, get_event_storage


def by_hand(cosines, patience, factor):
    """The factor of one method after each measurement."""
    smoothed, count, weight, seen = math.nan, 0, 1.0, []
    for cosine in cosines:
        if not math.isnan(cosine):
            smoothed = cosine if math.isnan(smoothed) else 0.9 * smoothed + 0.1 * cosine
            if smoothed < 0:
                count = count + 1 if count > 0 else 1
            else:
                count = count - 1 if count < 0 else -1
            if count >= patience:
                weight, count = weight * factor, 0
            elif count <= -patience and weight < 1:
                weight, count = min(1.0, weight / factor), 0
        seen.append(weight)
    return seen


def test_factors_are_those_by_hand_also_when_resumed():
    generator = torch.Generator().manual_seed(0)
    pulls = torch.randn(400, 3, generator=generator) + 2 * torch.sin(torch.arange(400) / 40)[:, None]
    pulls[::7, 1] = math.nan  # no gradient, or too large for float16
    cosines, guard = pulls.tanh(), GradientGuard(["A", "B", "C"], patience=5, factor=0.5)
    state, seen = guard.start(), []
    active = torch.tensor([True, True, False])
    for i, measured in enumerate(cosines):
        if i == 200:
            state = guard.load(guard.state_dict(state))
        state = guard.updated(state, measured, active)
        seen.append(state.factors.tolist())
    for method in (0, 1):
        want = by_hand(cosines[:, method].tolist(), 5, 0.5)
        assert [row[method] for row in seen] == want and {0.5, 0.25, 1.0} <= set(want)
    assert all(row[2] == 1 for row in seen)  # its weight is 0


def test_the_patience_that_is_used_up_stays_where_iterations_have_more_measurements():
    before, after = GradientGuard(["A", "B"], patience=10, factor=0.5), GradientGuard(["A", "B"], 40, 0.5)
    state, active = before.start(), torch.tensor([True, True])
    for _ in range(7):
        state = before.updated(state, torch.tensor([-0.5, 0.5]), active)
    assert after.load(before.state_dict(state)).counts.tolist() == [28, -28]
    assert before.load(after.state_dict(after.load(before.state_dict(state)))).counts.tolist() == [7, -7]


def step(balance, opposes, iteration, factors=None, weight=1.0):
    """Scaled losses, and what was logged, of a method A that opposes the task, or not, and of B at a right angle."""
    feature = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True) * 2
    task = {"loss": feature[:2].sum()}
    methods = {"A": {"p3": (-weight if opposes else weight) * feature[:3].sum()}, "B": {"p3": feature[3:].sum()}}
    with EventStorage(iteration) as storage:
        scaled = balance(task, methods, [feature], factors)
    return {m: (scaled[m]["p3"] / methods[m]["p3"]).item() for m in methods}, storage.latest()


def test_a_method_that_opposes_the_task_is_lowered_and_logged(caplog):
    balance = GradientBalance(["A", "B"], guard=GradientGuard(["A", "B"], patience=2, factor=0.5), period=5)
    with caplog.at_level(logging.INFO):
        scales = [step(balance, opposes=t < 20, iteration=t) for t in range(0, 40)]
    assert [s["A"] for s, _ in scales[:20:5]] == [1, 0.5, 0.5, 0.25] and all(s["B"] == 1 for s, _ in scales)
    logged = scales[5][1]
    assert logged["gradient_cosine/A"][0] == pytest.approx(-2 / math.sqrt(6)) and logged["guard/A"][0] == 0.5
    assert logged["gradient_cosine/B"][0] == 0 and "guard/A" not in scales[6][1]
    assert "Guard: A is lowered to 0.5 of its weight; the cosine" in caplog.text


def test_the_guard_and_the_ratio_are_both_factors():
    balance = GradientBalance(["A", "B"], ratio=2.0, guard=GradientGuard(["A", "B"], 1, 0.5), period=1)
    scales, _ = step(balance, opposes=True, iteration=0)
    assert scales == pytest.approx({"A": 0.5 * 2 * math.sqrt(2 / 3), "B": 2 * math.sqrt(2)}, rel=1e-5)
    state = balance.state_dict()
    other = GradientBalance(["A", "B"], ratio=2.0, guard=GradientGuard(["A", "B"], 1, 0.5), period=1)
    other.load_state_dict(state)
    assert other.state_dict() == state and other.scales().tolist() == balance.scales().tolist()
    before = GradientBalance(["A", "B"], ratio=2.0)  # of a run without guard
    other.load_state_dict(before.state_dict())
    assert other.state_dict()["guard"]["factors"] == [1.0, 1.0]


def test_a_method_whose_weight_is_scheduled_to_zero_is_not_judged():
    balance = GradientBalance(["A", "B"], guard=GradientGuard(["A", "B"], 1, 0.5), period=1)
    assert step(balance, opposes=True, iteration=0, factors={"A": 0.0})[0]["A"] == 1


@pytest.mark.parametrize("weight, want", [(10.0, 0.05 * math.sqrt(2 / 3)), (0.01, 1.0)])
def test_a_limit_makes_no_method_louder(weight, want):
    balance = GradientBalance(["A", "B"], ratio=0.5, limits=True)
    assert step(balance, opposes=False, iteration=0, weight=weight)[0]["A"] == pytest.approx(want, rel=1e-5)


def test_what_the_configuration_asks_for():
    cfg = config(DISTILL__GUARD__ENABLED=True, DISTILL__GUARD__PATIENCE=45, SOLVER__ACCUMULATE=2)
    balance = GradientBalance.from_config(cfg, ["A"])
    assert balance.ratio is None and balance.guard.patience == 2 * 5
    assert GradientBalance.from_config(config(), ["A"]) is None
    assert GradientBalance.from_config(config(DISTILL__BALANCE="limit"), ["A"]).limits
    cfg = config(SOLVER__REFERENCE_WORLD_SIZE=4, DISTILL__GUARD__PATIENCE=45)
    assert scale_to_processes(cfg, 2).DISTILL.GUARD.PATIENCE == 90


def test_periods_go_on_to_the_next_iteration_that_has_a_teacher(monkeypatch):
    every = {"DISTILL__TEACHER__EVERY": 3, "DISTILL__BALANCE": "ratio"}
    guard = {"DISTILL__GUARD__ENABLED": True, "DISTILL__GUARD__PATIENCE": 45}
    balance = GradientBalance.from_config(config(**every, **guard, DISTILL__LOG_GRADIENT_SHARE=20), ["A", "B"])
    assert balance.guard.patience == 4  # measured every 12 iterations
    measured, measure = [], balance._measure
    monkeypatch.setattr(balance, "_measure", lambda *a: (measured.append(get_event_storage().iter), measure(*a))[1])
    logged = [i for i in range(0, 100, 3) if "gradient_share/A" in step(balance, False, i)[1]]
    assert measured == sorted({*range(0, 100, 12), *range(0, 100, 21)}) and logged == list(range(0, 100, 21))
