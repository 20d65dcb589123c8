"""Schedules of the methods' weights: their values, their errors, and runs under them."""

import json
import math
import re

import pytest
import torch
from helpers import same_tensors
from models import batch, config, write_teacher
from runs import in_two_processes, read_checkpoint, run_training, train_in_step

from d2kd.config_reader import read_config
from d2kd.distillers import WeightSchedule, weight_schedules
from d2kd.engine.scaling import scale_to_batch, scale_to_processes
from d2kd.errors import ConfigError
from d2kd.modeling import build_distilled_model
from detectron2.utils.events import EventStorage


def test_factors_are_those_of_the_formulas():
    linear = WeightSchedule(max_iter=100, shape="linear", floor=0.2, warmup_iters=4, start_iter=20, end_iter=60)
    cosine = WeightSchedule(max_iter=100, shape="cosine", floor=0.2, warmup_iters=4)
    for t in range(100):
        rising = min(1.0, (t + 1) / 4)
        x = min(1.0, max(0.0, (t - 20) / 40))
        assert linear.factor(t) == pytest.approx(rising * (1 - 0.8 * x), abs=1e-12)
        x = max(0.0, (t - 4) / 96)
        assert cosine.factor(t) == pytest.approx(rising * (0.2 + 0.8 * (1 + math.cos(math.pi * x)) / 2), abs=1e-12)
    assert linear.factor(60) == linear.factor(99) == cosine.factor(100) == 0.2
    assert WeightSchedule(max_iter=9).always_one and not linear.always_one


def test_a_schedule_is_over_where_its_factor_stays_zero():
    stopped = WeightSchedule(max_iter=100, stop_iter=30)
    assert [stopped.factor(t) for t in (0, 29, 30, 99)] == [1, 1, 0, 0]
    fallen = WeightSchedule(max_iter=100, shape="linear", start_iter=10, end_iter=10)  # a step
    assert [fallen.factor(t) for t in (9, 10)] == [1, 0]
    assert [stopped.is_over(t) for t in (29, 30)] == [fallen.is_over(t) for t in (9, 10)] == [False, True]
    assert not WeightSchedule(max_iter=100, shape="linear", floor=0.1).is_over(10**6)


OWN = "DISTILL.LOGIT_KD.SCHEDULE"
WRONG = {
    r"DISTILL\.SCHEDULE\.END_ITER is 10: the decay would end before it starts, at iteration 50 \(START_ITER 20, WARM": [
        "DISTILL.SCHEDULE",
        dict(SHAPE="linear", END_ITER=10, START_ITER=20, WARMUP_ITERS=50),
    ],
    r"DISTILL\.SCHEDULE\.END_ITER is 0, SOLVER\.MAX_ITER 900: the decay would end before": [
        "DISTILL.SCHEDULE",
        dict(SHAPE="cosine", START_ITER=901),
    ],
    r"DISTILL\.SCHEDULE\.STOP_ITER is 900, which comes after the last iteration \(SOLVER\.MAX_ITER is 900\)": [
        "DISTILL.SCHEDULE",
        dict(STOP_ITER=900),
    ],
    r"DISTILL\.SCHEDULE\.STOP_ITER is 5: the schedule would end before it starts, at iteration 8": [
        "DISTILL.SCHEDULE",
        dict(STOP_ITER=5, WARMUP_ITERS=8),
    ],
    r"DISTILL\.SCHEDULE: the decay would start at iteration 900 \(START_ITER 900, WARMUP_ITERS 0\), and": [
        "DISTILL.SCHEDULE",
        dict(SHAPE="linear", START_ITER=900, END_ITER=950),
    ],
    r"DISTILL\.SCHEDULE\.WARMUP_ITERS is 901, and the training has 900 iterations \(SOLVER\.MAX_ITER\)": [
        "DISTILL.SCHEDULE",
        dict(WARMUP_ITERS=901),
    ],
    r"DISTILL\.SCHEDULE\.FLOOR is 0\.5, which has no effect with SHAPE constant": ["DISTILL.SCHEDULE", dict(FLOOR=0.5)],
    r"LOGIT_KD\.SCHEDULE\.STOP_ITER is 5, which has no effect with SHAPE shared": [OWN, dict(STOP_ITER=5)],
    r"LOGIT_KD\.SCHEDULE\.STOP_ITER is 1000, which comes after the last": [OWN, dict(SHAPE="constant", STOP_ITER=1000)],
}


@pytest.mark.parametrize("words", WRONG)
def test_schedules_that_contradict_themselves_or_the_length(words):
    node, values = WRONG[words]
    options = [x for key, value in values.items() for x in (f"{node}.{key}", value)]
    with pytest.raises(ConfigError, match=f"^[^\n]*{words}[^\n]*$"):
        read_config("", ["SOLVER.MAX_ITER", 900, *options])


def test_a_length_in_epochs_is_compared_when_it_is_known():
    options = ["DISTILL.SCHEDULE.STOP_ITER", 900, "SOLVER.MAX_ITER", 10]
    cfg = read_config("", [*options, "SOLVER.MAX_EPOCHS", 2.0])
    cfg.SOLVER.MAX_EPOCHS = 0.0
    with pytest.raises(ConfigError, match="STOP_ITER is 900, which comes after"):
        build_distilled_model(cfg)
    decays = WeightSchedule(max_iter=0, shape="linear", where="DISTILL.SCHEDULE")
    with pytest.raises(ConfigError, match=r"SCHEDULE ends with the training, .* \(SOLVER.MAX_EPOCHS\)"):
        decays.factor(0)


def test_schedules_are_scaled_with_the_iterations():
    keys = dict(SHAPE="linear", WARMUP_ITERS=10, START_ITER=20, END_ITER=60, STOP_ITER=80)
    given = {f"DISTILL__{node}SCHEDULE__{key}": value for node in ("", "LOGIT_KD__") for key, value in keys.items()}
    cfg = config(**given, SOLVER__MAX_ITER=100, SOLVER__REFERENCE_WORLD_SIZE=2, SOLVER__IMS_PER_BATCH=4)
    scaled = scale_to_processes(cfg, 1)
    for node in (scaled.DISTILL.SCHEDULE, scaled.DISTILL.LOGIT_KD.SCHEDULE):
        assert [node[key] for key in keys] == ["linear", 20, 40, 120, 160]
    assert scaled.DISTILL.FEATURE_MIMIC.SCHEDULE.STOP_ITER == 0
    cfg = config(
        SOLVER__REFERENCE_BATCH=2, SOLVER__IMS_PER_BATCH=64, SOLVER__MAX_ITER=100, DISTILL__SCHEDULE__STOP_ITER=1
    )
    cfg.DISTILL.LOGIT_KD.SCHEDULE.update(SHAPE="constant", STOP_ITER=99)
    scale_to_batch(cfg)  # neither never, nor behind the end
    assert (cfg.SOLVER.MAX_ITER, cfg.DISTILL.SCHEDULE.STOP_ITER, cfg.DISTILL.LOGIT_KD.SCHEDULE.STOP_ITER) == (3, 1, 2)


@pytest.mark.parametrize(
    "length, keys",
    [(10, dict(WARMUP_ITERS=6, STOP_ITER=8)), (1000, dict(SHAPE="cosine", START_ITER=998, STOP_ITER=999))],
)
def test_what_is_right_is_right_when_it_is_scaled(length, keys):
    cfg = config(SOLVER__REFERENCE_BATCH=4, SOLVER__IMS_PER_BATCH=16, SOLVER__MAX_ITER=length)
    cfg.DISTILL.SCHEDULE.update(**keys)
    scale_to_batch(cfg)
    (schedule,) = weight_schedules(cfg, {"LogitKD": "LOGIT_KD"}).values()  # checks itself
    assert schedule.first < schedule.stop_iter < cfg.SOLVER.MAX_ITER


@pytest.fixture
def net(tmp_path):
    """A model of two methods, of which one has a schedule of its own; and the losses of an iteration."""

    def build(**changes):
        named = write_teacher(tmp_path)
        torch.manual_seed(0)
        keys = dict(DISTILL__METHODS=["FeatureMimic", "LogitKD"], SOLVER__MAX_ITER=100)
        return build_distilled_model(config(**keys, **changes, **named)).train()

    return build


def losses_of(model, iteration, seed=0):
    with EventStorage(iteration) as storage:
        losses = model(batch([(64, 64)], seed))
    return losses, {k: v for k, (v, _) in storage.latest().items() if k.startswith("schedule/")}


def test_losses_are_multiplied_and_the_factors_logged(net):
    shared = dict(DISTILL__SCHEDULE__SHAPE="linear", DISTILL__SCHEDULE__FLOOR=0.5)
    own = dict(DISTILL__LOGIT_KD__SCHEDULE__SHAPE="constant", DISTILL__LOGIT_KD__SCHEDULE__WARMUP_ITERS=80)
    (plain, none), (scheduled, factors) = (losses_of(net(**keys), 39) for keys in ({}, {**shared, **own}))
    assert none == {} and factors == {"schedule/FeatureMimic": pytest.approx(1 - 0.5 * 0.39), "schedule/LogitKD": 0.5}
    assert plain.keys() == scheduled.keys()
    for name, loss in plain.items():
        factor = factors.get("schedule/" + name.split("/")[1], 1.0) if "/" in name else 1.0
        assert scheduled[name].item() == pytest.approx(factor * loss.item(), rel=1e-6)


def test_a_teacher_of_every_second_iteration_has_twice_the_scheduled_weight(net):
    plain, _ = losses_of(net(), 40)
    model = net(DISTILL__TEACHER__EVERY=2, DISTILL__SCHEDULE__SHAPE="linear", DISTILL__GUARD__ENABLED=True)
    losses, _ = losses_of(model, 40)
    name = "distill/FeatureMimic/p3"
    assert losses[name].item() == pytest.approx(2 * 0.6 * plain[name].item(), rel=1e-5)
    assert name not in losses_of(model, 41)[0] and model.balance.guard.patience == 20


def test_the_teacher_rests_when_all_methods_are_over(net):
    model = net(DISTILL__SCHEDULE__STOP_ITER=50, DISTILL__LOGIT_KD__SCHEDULE__SHAPE="constant")
    assert model.schedules.keys() == {"FeatureMimic"}
    calls = []
    model.teacher.model.register_forward_pre_hook(lambda *_: calls.append(1))
    losses, _ = losses_of(model, 50)  # LogitKD goes on
    assert len(calls) == 1 and losses["distill/FeatureMimic/p3"] == 0 and losses["distill/LogitKD/head.cls_score@0"] > 0
    model = net(DISTILL__SCHEDULE__STOP_ITER=50, DISTILL__BALANCE="gradient", DISTILL__LOG_GRADIENT_SHARE=1)
    model.teacher.model.register_forward_pre_hook(lambda *_: calls.append(2))
    before, _ = losses_of(model, 49)
    after, factors = losses_of(model, 50)
    assert calls == [1, 2] and before.keys() == after.keys() and set(factors.values()) == {0.0}
    sum(after.values()).backward()  # every parameter has a gradient, those of the methods 0
    assert all(p.grad is not None for p in model.parameters())
    assert not any(p.grad.any() for p in model.distillers.parameters())


def test_a_balanced_method_has_ratio_times_factor(net):
    keys = dict(DISTILL__BALANCE="gradient", DISTILL__BALANCE_RATIO=0.5, DISTILL__LOG_GRADIENT_SHARE=1)
    model = net(**keys, DISTILL__SCHEDULE__SHAPE="linear", DISTILL__LOGIT_KD__SCHEDULE__SHAPE="constant")
    with EventStorage(60) as storage:
        model(batch([(64, 64)]))
    shares = {k.split("/")[1]: v for k, (v, _) in storage.latest().items() if k.startswith("gradient_share")}
    total = 1 + 0.5 * 0.4 + 0.5
    want = {"task": 1 / total, "FeatureMimic": 0.2 / total, "LogitKD": 0.5 / total}
    assert shares == pytest.approx(want, rel=1e-4)


def test_the_measured_gradient_of_a_method_that_is_over_stays(net):
    model = net(DISTILL__BALANCE="gradient", DISTILL__FEATURE_MIMIC__SCHEDULE__SHAPE="constant",
                DISTILL__FEATURE_MIMIC__SCHEDULE__STOP_ITER=10)  # fmt: skip
    losses_of(model, 0)
    norms = model.balance.state_dict()["norms"]
    losses_of(model, 20, seed=1)
    after = model.balance.state_dict()["norms"]
    assert after[1] == norms[1] and after[2] != norms[2]


#: All that is new together: cross heads, weighted positions, the guard, and methods that end one after the other.
SCHEDULED = dict(
    DISTILL__METHODS=["ChannelMatching", "FeatureMimic", "CrossKD"],
    DISTILL__CHANNEL_MATCHING__TRACK_IMAGES=8,
    DISTILL__FEATURE_MIMIC__FOREGROUND=0.5,
    DISTILL__SCHEDULE__SHAPE="cosine",
    DISTILL__SCHEDULE__WARMUP_ITERS=2,
    DISTILL__SCHEDULE__STOP_ITER=5,
    DISTILL__CHANNEL_MATCHING__SCHEDULE__SHAPE="linear",
    DISTILL__CHANNEL_MATCHING__SCHEDULE__STOP_ITER=4,
    DATASETS__TEST=[],
)
GUARDED = dict(
    DISTILL__BALANCE="limit",
    DISTILL__BALANCE_PERIOD=1,
    DISTILL__GUARD__ENABLED=True,
    DISTILL__GUARD__PATIENCE=1,
    DISTILL__GUARD__FACTOR=0.7,
)


def test_a_run_resumes_bit_equal_and_logs_its_factors(write_config, teacher, tmp_path):
    path = write_config(**SCHEDULED, **GUARDED, **teacher)
    run_training(path, OUTPUT_DIR=str(tmp_path / "whole"))
    run_training(path, OUTPUT_DIR=str(tmp_path / "parts"), stop_at=3)
    run_training(path, OUTPUT_DIR=str(tmp_path / "parts"), resume=True)
    whole, parts = read_checkpoint(tmp_path / "whole"), read_checkpoint(tmp_path / "parts")
    assert same_tensors(whole["model"], parts["model"])
    a, b = ({k: v for k, v in run["distillers"].items() if torch.is_tensor(v)} for run in (whole, parts))
    assert same_tensors(a, b) and len(a) > 5
    assert whole["balance"] == parts["balance"] and whole["balance"]["guard"]["factors"] != [1, 1, 1]
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.json").read_text().splitlines()]
    assert lines[-1]["schedule/ChannelMatching"] == lines[-1]["schedule/CrossKD"] == 0
    assert "guard/CrossKD" in {name for line in lines for name in line}


def test_steps_after_the_end_are_those_of_the_task_alone(write_config, teacher, tmp_path):
    keys = {**SCHEDULED, "DISTILL__SCHEDULE__STOP_ITER": 3, "DISTILL__CHANNEL_MATCHING__SCHEDULE__STOP_ITER": 3}
    path = write_config(**keys, **teacher)
    run_training(path, OUTPUT_DIR=str(tmp_path / "over"))
    run_training(path, OUTPUT_DIR=str(tmp_path / "zero"), stop_at=3)
    zero = {f"DISTILL__{node}__WEIGHT": 0.0 for node in ("CHANNEL_MATCHING", "FEATURE_MIMIC", "CROSS_KD")}
    nothing = {key: value for key, value in SCHEDULED.items() if "SCHEDULE" not in key}
    path = write_config("zero", **nothing, **zero, **teacher)
    run_training(path, OUTPUT_DIR=str(tmp_path / "zero"), resume=True)
    a, b = (read_checkpoint(tmp_path / name)["model"] for name in ("over", "zero"))
    assert same_tensors(a, b)


def test_with_weight_zero_the_student_trains_as_alone(write_config, teacher, tmp_path):
    new = {key: value for key, value in SCHEDULED.items() if "CHANNEL_MATCHING" not in key}
    new["DISTILL__METHODS"] = ["FeatureMimic", "CrossKD"]
    zero = {f"DISTILL__{node}__WEIGHT": 0.0 for node in ("FEATURE_MIMIC", "CROSS_KD")}
    start = {"DISTILL__INIT_FROM_TEACHER__ENABLED": False, "SOLVER__MAX_ITER": 4, "DISTILL__SCHEDULE__STOP_ITER": 3}
    run_training(write_config("zero", **{**new, **zero, **start}, **GUARDED, **teacher))
    run_training(write_config("alone", DATASETS__TEST=[], SOLVER__MAX_ITER=4))
    a, b = (read_checkpoint(tmp_path / name)["model"] for name in ("zero", "alone"))
    assert same_tensors(a, b)


def test_two_processes_stay_in_step(write_config, teacher, tmp_path):
    short = {"SOLVER__MAX_ITER": 4, "SOLVER__IMS_PER_BATCH": 2, "DISTILL__SCHEDULE__STOP_ITER": 3}
    short |= {"DISTILL__SCHEDULE__WARMUP_ITERS": 1, "DISTILL__CHANNEL_MATCHING__SCHEDULE__STOP_ITER": 2}
    path = write_config(**{**SCHEDULED, **GUARDED, **short}, **teacher)
    in_two_processes(train_in_step, path, tmp_path / "two")
    assert re.search(r'"schedule/ChannelMatching": 0\.0', (tmp_path / "two/metrics.json").read_text())
