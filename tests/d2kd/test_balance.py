"""Shares of task and methods in the gradient, balancing them, and several methods together."""

import json
import logging
import re

import pytest
import torch
from helpers import same_tensors
from models import FASTER_RCNN, RETINANET, batch, config, model, write_teacher
from runs import ROOT, in_two_processes, read_checkpoint, run_training, train_in_step

from d2kd.data.datasets import register_datasets
from d2kd.engine import CheckpointError, DistillTrainer, NonFiniteLossError, load_config
from d2kd.modeling import BalanceError, GradientBalance, build_distilled_model
from d2kd.token_learning import TokenLearner
from detectron2.utils.events import EventStorage

CPU = ["MODEL.DEVICE", "cpu"]
THREE = ["MaskedGenerative", "LogitKD", "HeadRegression"]


def toy(weight=3.0, seed=0):
    """A feature, a task loss and two methods of which one depends on the feature through a layer."""
    torch.manual_seed(seed)
    x = torch.randn(2, 3, requires_grad=True)
    feature = x * 2
    task = {"loss_cls": feature.square().sum(), "loss_box": (2 * feature).sum()}
    methods = {"A": {"p3": weight * feature.abs().sum()}, "B": {"p3": (feature * 5).sum(), "p4": (feature * 2).sum()}}
    return x, feature, task, methods


def gradient_norm(losses, feature):
    total = sum(losses.values())
    return torch.autograd.grad(total, feature, retain_graph=True)[0].norm().item() if total.requires_grad else 0.0


def logged_values(storage, prefix):
    return {name[len(prefix) :]: v for name, (v, _) in storage.latest().items() if name.startswith(prefix)}


def test_scaled_gradients_have_the_chosen_ratio_to_the_tasks():
    _, feature, task, methods = toy()
    balance = GradientBalance(["A", "B"], ratio=0.25)
    with EventStorage():
        scaled = balance(task, methods, [feature])
    for name in methods:
        assert gradient_norm(scaled[name], feature) == pytest.approx(0.25 * gradient_norm(task, feature), rel=1e-5)
        assert scaled[name].keys() == methods[name].keys()


def test_scales_are_smoothed_and_measured_once_a_period():
    balance = GradientBalance(["A", "B"], ratio=1.0, period=2)
    norms, seen = [], []
    with EventStorage() as storage:
        for seed in range(3):
            _, feature, task, methods = toy(weight=1.0 + seed, seed=seed)
            norms.append([gradient_norm(t, feature) for t in (task, methods["A"])])
            balance(task, methods, [feature])
            seen.append(balance.scales()[0].item())
            storage.step()
    assert seen[0] == seen[1] == pytest.approx(norms[0][0] / norms[0][1], rel=1e-5)
    smoothed = [0.9 * a + 0.1 * b for a, b in zip(norms[0], norms[2])]
    assert seen[2] == pytest.approx(smoothed[0] / smoothed[1], rel=1e-5)


def measured(balance, *norms):
    """The scales after measurements of these norms, (task, A)."""
    for both in norms:
        balance._update(torch.tensor(both), torch.tensor([True, True]))
    return balance.scales().item()


def test_what_begins_without_a_gradient_comes_to_its_ratio_at_once():
    assert measured(GradientBalance(["A"], ratio=0.5), (2.0, 0.0), (2.0, 4.0)) == pytest.approx(0.25)
    assert measured(GradientBalance(["A"], ratio=0.5), (0.0, 4.0), (2.0, 4.0)) == pytest.approx(0.25)


def test_a_limit_holds_when_a_gradient_jumps():
    limits = GradientBalance(["A"], ratio=0.5, limits=True)
    assert measured(limits, (2.0, 0.1)) == 1.0
    assert measured(limits, (2.0, 20.0)) == pytest.approx(0.05)
    assert 0.05 < measured(limits, (2.0, 0.1)) < 0.06  # and falls slowly


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_logged_shares_are_those_of_the_losses_that_are_returned(ratio):
    _, feature, task, methods = toy()
    with EventStorage() as storage:
        scaled = GradientBalance(["A", "B"], ratio=ratio, log_period=1)(task, methods, [feature])
    norms = {
        "task": gradient_norm(task, feature),
        **{name: gradient_norm(losses, feature) for name, losses in scaled.items()},
    }
    shares = logged_values(storage, "gradient_share/")
    assert shares == pytest.approx({name: x / sum(norms.values()) for name, x in norms.items()}, rel=1e-5)
    assert set(logged_values(storage, "balance/")) == (set() if ratio is None else {"A", "B"})


def test_logging_keeps_to_its_period_and_leaves_the_losses_alone():
    balance, logged = GradientBalance(["A", "B"], log_period=3), []
    with EventStorage() as storage:
        for _ in range(5):
            x, feature, task, methods = toy()
            assert balance(task, methods, [feature])["A"]["p3"] is methods["A"]["p3"]
            assert x.grad is None
            logged.append(
                "gradient_share/task" in storage.latest() and storage.latest()["gradient_share/task"][1] == storage.iter
            )
            storage.step()
    assert logged == [True, False, False, True, False]


def test_a_method_of_weight_zero_stays_at_zero():
    _, feature, task, methods = toy()
    methods["A"] = {"p3": torch.zeros(())}
    with EventStorage():
        balance = GradientBalance(["A", "B"], ratio=0.5)
        scaled = balance(task, methods, [feature])
    assert scaled["A"]["p3"].item() == 0 and balance.scales()[0] == 1
    assert gradient_norm(scaled["B"], feature) == pytest.approx(0.5 * gradient_norm(task, feature), rel=1e-5)


def test_losses_that_are_not_finite_leave_the_scales_as_they_were():
    _, feature, task, methods = toy()
    balance = GradientBalance(["A", "B"], ratio=0.5, period=1)
    with EventStorage():
        balance(task, methods, [feature])
        before = balance.state_dict()
        balance({**task, "loss_cls": task["loss_cls"] * float("nan")}, methods, [feature])
    assert balance.state_dict() == before


def test_float16_neither_underflows_nor_stays_overflown():
    x, layer = torch.randn(4, 8, requires_grad=True), torch.nn.Linear(8, 8)
    balance, tried = GradientBalance(["A"], ratio=1.0, period=100), []
    with EventStorage() as storage, torch.autocast("cpu", dtype=torch.float16):
        for _ in range(10):
            out = layer(x)
            assert out.dtype == torch.float16
            scaled = balance({"loss": 1e-8 * out.float().sum()}, {"A": {"p3": 8 * out.float().sum()}}, [x])["A"]
            tried.append(balance.state_dict()["loss_scale"])
            storage.step()
    assert tried[0] == 2.0**15 and tried[-1] == tried[-2] < 2.0**14
    want = 1e-8 / 8
    assert balance.scales()[0].item() == pytest.approx(want, rel=0.02)
    assert scaled["p3"].item() == pytest.approx(8 * want * out.float().sum().item(), rel=0.02)


def test_the_loss_scale_of_measurements_rises_again():
    balance = GradientBalance(["A"], log_period=1)
    balance._adapt_loss_scale(torch.tensor(False))
    for _ in range(99):
        balance._adapt_loss_scale(torch.tensor(True))
    assert balance.state_dict()["loss_scale"] == 2.0**15
    again = GradientBalance(["A"], log_period=1)
    again.load_state_dict(balance.state_dict())
    for finite, want in ((True, 2.0**16), (False, 2.0**15), *[(True, 2.0**15)] * 99, (True, 2.0**16)):
        again._adapt_loss_scale(torch.tensor(finite))
        assert again.state_dict()["loss_scale"] == want
    for _ in range(150):
        again._adapt_loss_scale(torch.tensor(True))
    assert again.state_dict()["loss_scale"] == 2.0**16


def test_features_that_are_views_are_measured_where_the_model_goes_on():
    x = torch.randn(2, 4, 4, 3, requires_grad=True)
    block = x * 1.5
    with EventStorage():
        balance = GradientBalance(["A"], ratio=1.0)
        view = block.permute(0, 3, 1, 2)
        scaled = balance({"loss": block.square().sum()}, {"A": {"b": view.sum()}}, [view])["A"]
    assert gradient_norm(scaled, block) == pytest.approx((2 * block).norm().item(), rel=1e-5)


def test_state_survives_a_checkpoint_and_belongs_to_its_methods():
    _, feature, task, methods = toy()
    one, other = (GradientBalance(["A", "B"], ratio=0.5) for _ in range(2))
    with EventStorage():
        one(task, methods, [feature])
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.scales(), other.scales()) and other.state_dict() == one.state_dict()
    with pytest.raises(BalanceError, match=r"DISTILL\.METHODS\b"):
        GradientBalance(["A"], ratio=0.5).load_state_dict(one.state_dict())


def test_frozen_features_are_an_error():
    with EventStorage(), pytest.raises(BalanceError, match=r"MODEL\.BACKBONE\.FREEZE_AT\b"):
        GradientBalance(["A"], ratio=1.0)({}, {"A": {}}, [torch.zeros(2)])


def test_a_task_that_does_not_depend_on_the_features_is_an_error():
    _, feature, task, methods = toy()
    apart = {"loss": torch.ones(2, requires_grad=True).sum()}
    with EventStorage(), pytest.raises(BalanceError, match="no loss of the task depends on the tapped features"):
        GradientBalance(["A", "B"], ratio=1.0)(apart, methods, [feature])


@pytest.mark.parametrize("key", ["DISTILL__BALANCE", "DISTILL__GUARD__ENABLED"])
def test_a_task_of_no_weight_is_nothing_to_compare_with(key):
    cfg = config(**{key: "limit" if key.endswith("BALANCE") else True}, DISTILL__TASK_WEIGHT=0.0)
    with pytest.raises(BalanceError, match=rf"{key.replace('__', '.')} compares .*TASK_WEIGHT is 0"):
        GradientBalance.from_config(cfg, ["A"])


def test_fixed_and_silent_costs_nothing():
    assert GradientBalance.from_config(config(), ["A"]) is None
    assert GradientBalance.from_config(config(DISTILL__BALANCE="gradient"), []) is None


@pytest.mark.parametrize("base", [RETINANET, FASTER_RCNN], ids=["RetinaNet", "FasterRCNN"])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_three_methods_together_keep_the_ratio(tmp_path, base, precision):
    named = write_teacher(tmp_path, config(base))
    changes = dict(DISTILL__BALANCE="gradient", DISTILL__BALANCE_RATIO=0.3, DISTILL__LOG_GRADIENT_SHARE=1)
    net = build_distilled_model(config(base, DISTILL__METHODS=THREE, **changes, **named)).train()
    with EventStorage() as storage, torch.autocast("cpu", dtype=precision, enabled=precision is not None):
        losses = net(batch())
    assert all(p.grad is None for p in net.parameters())
    sum(losses.values()).backward()
    shares = logged_values(storage, "gradient_share/")
    assert shares == pytest.approx({"task": 1 / 1.9, **{name: 0.3 / 1.9 for name in THREE}}, rel=1e-4)
    assert {name.split("/")[1] for name in losses if name.startswith("distill/")} == set(THREE)
    assert all(p.grad is not None for p in net.student.parameters())


def test_every_method_has_taps_and_a_weight_of_its_own(tmp_path):
    together = ["MaskedGenerative", "ReceptiveTokens", "LogitKD"]
    named = write_teacher(tmp_path, config())
    learner = TokenLearner(model(config(), seed=7))  # of the teacher that is written above
    learner.export_tokens(dict.fromkeys(learner.taps, 0.0), 0).save(str(tmp_path / "tokens.pth"))

    def losses(**changes):
        taps = dict(DISTILL__MASKED_GENERATIVE__TAPS=["p3", "p4"], DISTILL__RECEPTIVE_TOKENS__TAPS=["p5"])
        keys = dict(DISTILL__METHODS=together, DISTILL__RECEPTIVE_TOKENS__FILE=str(tmp_path / "tokens.pth"), **taps)
        torch.manual_seed(0)
        net = build_distilled_model(config(**keys, **changes, **named)).train()
        with EventStorage():
            return {name: loss.item() for name, loss in net(batch()).items()}

    plain = losses()
    taps = {name.split("/", 1)[1] for name in plain if name.startswith(("distill/Masked", "distill/Receptive"))}
    assert taps == {"MaskedGenerative/p3", "MaskedGenerative/p4", "ReceptiveTokens/p5"}
    assert any(name.startswith("distill/LogitKD/") for name in plain)
    tripled = losses(DISTILL__RECEPTIVE_TOKENS__WEIGHT=3 * config().DISTILL.RECEPTIVE_TOKENS.WEIGHT)
    want = {name: (3 if "ReceptiveTokens" in name else 1) * value for name, value in plain.items()}
    assert tripled == pytest.approx(want, rel=1e-5)


def test_methods_without_taps_in_the_backbone_are_measured_on_its_outputs(tmp_path):
    named = write_teacher(tmp_path, config())
    net = build_distilled_model(config(DISTILL__METHODS=["LogitKD"], DISTILL__LOG_GRADIENT_SHARE=1, **named)).train()
    with EventStorage() as storage:
        net(batch())
    assert net._balanced_taps == ["p3", "p4", "p5", "p6", "p7"]
    assert 0 < logged_values(storage, "gradient_share/")["LogitKD"] < 1


BALANCED = dict(
    DISTILL__METHODS=THREE,
    DISTILL__BALANCE="gradient",
    DISTILL__BALANCE_PERIOD=2,
    DISTILL__LOG_GRADIENT_SHARE=2,
    DATASETS__TEST=[],
)


def test_balanced_run_resumes_bit_equal_and_logs_shares(write_config, teacher, tmp_path, caplog):
    path = write_config(**BALANCED, **teacher)
    with caplog.at_level(logging.INFO):
        run_training(path, OUTPUT_DIR=str(tmp_path / "whole"))
    run_training(path, OUTPUT_DIR=str(tmp_path / "parts"), stop_at=3)
    run_training(path, OUTPUT_DIR=str(tmp_path / "parts"), resume=True)
    whole, parts = read_checkpoint(tmp_path / "whole"), read_checkpoint(tmp_path / "parts")
    assert same_tensors(whole["model"], parts["model"]) and whole["balance"] == parts["balance"]
    logged = {k for line in (tmp_path / "whole/metrics.json").read_text().splitlines() for k in json.loads(line)}
    assert {f"gradient_share/{name}" for name in ["task", *THREE]} <= logged
    assert re.search(r"gradient share: .*task 0\.\d+", caplog.text)
    with pytest.raises(CheckpointError, match=r"DISTILL\.METHODS|state dict|state_dict"):
        run_training(
            path, OUTPUT_DIR=str(tmp_path / "parts"), resume=True, DISTILL__METHODS=["LogitKD"], SOLVER__MAX_ITER=8
        )


def test_a_failed_step_leaves_neither_norms_nor_random_numbers_behind(write_config, teacher, tmp_path):
    path = write_config(**BALANCED, **teacher)
    cfg = load_config(str(path))
    register_datasets(cfg)
    torch.manual_seed(cfg.SEED)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=False)
    distiller, before = trainer.distilled.distillers["MaskedGenerative"], []
    plain = distiller.level_loss

    def level_loss(level, student, teacher_map):
        loss = plain(level, student, teacher_map)
        if trainer.iter != 4:
            return loss
        before.append(torch.get_rng_state())
        return loss + (1 + torch.rand(())) * float("inf")  # the gradient stays finite: the norms are updated

    distiller.level_loss = level_loss
    with pytest.raises(NonFiniteLossError, match="iteration 4"):
        trainer.train()
    kept = read_checkpoint(tmp_path / "student", "model_before_failure_0000004")
    assert torch.equal(kept["trainer"]["process_states"][0]["torch"], before[0])
    run_training(path, resume=True)
    run_training(path, OUTPUT_DIR=str(tmp_path / "whole"))
    a, b = read_checkpoint(tmp_path / "whole"), read_checkpoint(tmp_path / "student")
    assert same_tensors(a["model"], b["model"]) and a["balance"] == b["balance"]


def test_two_processes_stay_in_step(write_config, teacher, tmp_path):
    path = write_config(**BALANCED, **teacher)
    in_two_processes(train_in_step, path, tmp_path / "two")
    assert read_checkpoint(tmp_path / "two")["balance"]["norms"][0] > 0


@pytest.mark.parametrize("name, methods", [("combined", ["MaskedGenerative", "CrossKD"]), ("LogitKD", ["LogitKD"])])
def test_recipes_build_and_step(tmp_path, name, methods):
    directory = ROOT / "configs/PhotoDigits"
    torch.save(
        {"model": model(load_config(str(directory / "retinanet_teacher.yaml"), CPU)).state_dict()}, tmp_path / "t.pth"
    )
    options = [*CPU, "DISTILL.TEACHER.WEIGHTS", str(tmp_path / "t.pth")]
    net = build_distilled_model(load_config(str(directory / f"retinanet_student_{name}.yaml"), options)).train()
    with EventStorage():
        losses = net(batch([(64, 64)]))
    sum(losses.values()).backward()
    assert {n.split("/")[1] for n in losses if n.startswith("distill/")} == set(methods)


@pytest.mark.parametrize("tap", ["backbone.bottom_up.res4", "backbone.bottom_up.stem", "backbone.fpn_output3"])
def test_module_paths_in_the_backbone_share_its_gradient(tmp_path, tap):
    keys = {"DISTILL__FEATURE_MIMIC__TAPS": [tap], "DISTILL__BALANCE": "gradient"}
    net = build_distilled_model(config(**write_teacher(tmp_path), **keys))
    assert net._balanced_taps == [tap]


@pytest.mark.parametrize("tap", ["res4.0.conv2", "stem.conv1", "res4.pre_relu"])
def test_taps_inside_the_backbone_have_the_tasks_gradient(tmp_path, tap):
    keys = {"DISTILL__FEATURE_MIMIC__TAPS": [tap], "DISTILL__METHODS": ["FeatureMimic"], "DISTILL__BALANCE": "gradient"}
    net = build_distilled_model(config(**write_teacher(tmp_path), **keys, DISTILL__LOG_GRADIENT_SHARE=1)).train()
    with EventStorage() as storage:
        net(batch())
    assert logged_values(storage, "gradient_share/")["task"] == pytest.approx(2 / 3, rel=1e-4)
