"""The moving average of the weights: its numbers, its evaluation, its file, exact resuming."""

from pathlib import Path

import pytest
import torch
from helpers import same_tensors
from runs import read_checkpoint, run_training, tool
from torch import nn

from d2kd.engine import load_config
from d2kd.engine.ema import ModelEMA
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

EMA = {"SOLVER__EMA__ENABLED": True, "SOLVER__EMA__DECAY": 0.7, "SOLVER__EMA__WARMUP": 4.0}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def test_update_is_the_formula_for_weights_and_statistics_and_a_copy_for_counters():
    live = network()
    average = ModelEMA(live, decay=0.9)
    start = {name: x.clone() for name, x in live.state_dict().items()}
    with torch.no_grad():
        live[0].weight.add_(1.0)
    live(torch.randn(2, 3, 5, 5))
    average.update()
    ours = average.model.state_dict()
    for name in ("0.weight", "0.bias", "1.running_mean", "1.running_var"):
        torch.testing.assert_close(ours[name], 0.9 * start[name] + 0.1 * live.state_dict()[name])
    assert ours["1.num_batches_tracked"] == 1
    assert not average.model.training and not any(p.requires_grad for p in average.model.parameters())


def test_warmup_lets_the_share_of_the_old_average_grow():
    average = ModelEMA(network(), decay=0.9, warmup=10.0)
    assert average.decay_at(1) == 2 / 11 and average.decay_at(10_000) == 0.9
    assert ModelEMA(network(), decay=0.9).decay_at(1) == 0.9


def test_a_constant_model_stays_bit_equal():
    live = network()
    average = ModelEMA(live, decay=0.3, warmup=5.0)
    for _ in range(7):
        average.update()
    assert same_tensors(average.model.state_dict(), live.state_dict())


def test_shared_parameters_are_averaged_once():
    live = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    live[1].weight = live[0].weight
    average = ModelEMA(live, decay=0.5)
    before = live[0].weight.detach().clone()
    with torch.no_grad():
        live[0].weight.add_(1.0)
    average.update()
    torch.testing.assert_close(average.model[0].weight, before + 0.5)
    assert average.model[0].weight is average.model[1].weight


@pytest.mark.parametrize("decay, warmup, key", [(1.0, 0.0, "DECAY"), (-0.1, 0.0, "DECAY"), (0.5, -1.0, "WARMUP")])
def test_values_out_of_range_name_their_key(decay, warmup, key):
    with pytest.raises(ValueError, match=rf"SOLVER\.EMA\.{key}\b"):
        ModelEMA(network(), decay, warmup)


def test_training_evaluates_both_and_writes_the_average_as_a_plain_student(write_config, tmp_path):
    path = write_config(**EMA)
    trainer = run_training(path)
    assert {"bbox", "bbox_EMA"} <= set(trainer.evaluation.results)
    final, average = read_checkpoint(tmp_path / "student"), read_checkpoint(tmp_path / "student", "model_final_ema")
    assert same_tensors(final["ema"]["model"], average["model"]) and final["ema"]["updates"] == 6
    assert not same_tensors(final["model"], average["model"])
    student = build_model(load_config(str(path)))
    problems = DetectionCheckpointer(student)._load_model({"model": dict(average["model"])})
    assert not problems.missing_keys and not problems.unexpected_keys and not problems.incorrect_shapes
    assert (tmp_path / "student/inference_EMA/coco_instances_results.json").is_file()
    assert (tmp_path / "student/last_checkpoint").read_text().strip() == "model_final.pth"


def test_the_average_follows_every_step_of_a_run_and_does_not_change_it(write_config, tmp_path):
    plain = run_training(write_config("plain"))
    path = write_config("averaged", SOLVER__CHECKPOINT_PERIOD=1, **EMA)
    trainer = run_training(path)
    assert same_tensors(plain.student.state_dict(), trainer.student.state_dict())
    live = build_model(load_config(str(path)))
    live.load_state_dict(read_checkpoint(tmp_path / "averaged", "model_0000000")["model"])
    average = ModelEMA(live, 0.7, 4.0)
    average.load_state_dict(read_checkpoint(tmp_path / "averaged", "model_0000000")["ema"])
    for name in [f"model_{i:07d}" for i in range(1, 5)] + ["model_final"]:
        live.load_state_dict(read_checkpoint(tmp_path / "averaged", name)["model"])
        average.update()
    assert same_tensors(average.model.state_dict(), trainer.ema.model.state_dict())


def test_the_average_of_any_checkpoint_is_exported(write_config, tmp_path):
    path = write_config(**EMA)
    run_training(path)
    source, target = tmp_path / "student/model_0000002.pth", tmp_path / "average.pth"
    tool("export_student", source, target, "--ema", "--config-file", path)
    expected = read_checkpoint(tmp_path / "student", "model_0000002")["ema"]["model"]
    assert same_tensors(torch.load(target, weights_only=True)["model"], expected)
    run_training(write_config("plain"))
    done = tool("export_student", tmp_path / "plain/model_final.pth", target, "--ema", check=False)
    assert done.returncode == 2 and "SOLVER.EMA.ENABLED" in done.stdout


def test_resumed_average_is_bit_equal(write_config, teacher, tmp_path):
    whole = run_training(write_config("whole", **EMA, **teacher))
    path = write_config("parts", **EMA, **teacher)
    run_training(path, stop_at=3)
    parts = run_training(path, resume=True)
    assert parts.start_iter == 3 and parts.ema.updates == 6
    assert same_tensors(parts.ema.model.state_dict(), whole.ema.model.state_dict())


def test_switched_on_while_resuming_it_starts_from_the_student_of_then(write_config, tmp_path, caplog):
    path: Path = write_config()
    run_training(path, stop_at=3)
    trainer = run_training(path, resume=True, **EMA)
    assert "no average" in caplog.text and trainer.ema.updates == 3
