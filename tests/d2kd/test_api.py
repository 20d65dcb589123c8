"""Distillation from Python, as the documentation prints it."""

import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from documentation import code_block
from models import batch
from runs import run_training

import d2kd
from d2kd.distillers import DISTILLERS
from d2kd.errors import ConfigError, UserError
from d2kd.modeling import build_distilled_model as build_without_weights
from detectron2.modeling import build_model

PAGE = "python.md"


@pytest.fixture
def folder(
    write_config: Callable[..., Path], teacher: dict[str, Any], digits: Path, tmp_path: Path, forget_datasets: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:  # fmt: skip
    """A working directory with student.yaml, teacher.yaml, teacher.pth and digits, as the page has it."""
    write_config("student", MODEL__RETINANET__SCORE_THRESH_TEST=0.0)
    (tmp_path / "digits").symlink_to(digits)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(heading: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(code_block(PAGE, heading), heading, "exec"), names)
    return names


def handlers() -> list[logging.Handler]:
    return [h for name in ("d2kd", "detectron2", "d2lite", "fvcore") for h in logging.getLogger(name).handlers]


# ---- one call ----


def test_one_call_runs_as_printed_and_writes_what_the_command_writes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = handlers()
    result = run("One call")["result"]
    assert handlers() == before
    shown = capsys.readouterr().out
    assert "Starting training" in shown and "total_loss" in shown  # progress, on the output of a notebook's cell
    assert set(result.paths) == {"weights", "config", "result", "metrics", "log"}
    assert result.metrics["bbox"].keys() >= {"AP", "AP50"} and result.teacher_metrics["bbox"].keys() >= {"AP"}
    saved = torch.load(result.paths["weights"], weights_only=True)
    assert saved["iteration"] == 3  # the last of four
    state = result.student.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in saved["model"].items())
    assert not result.student.training and "instances" in result.student([{"image": batch()[0]["image"]}])[0]
    assert result.cfg.SOLVER.MAX_ITER == 4
    assert json.loads(result.paths["result"].read_text())["iterations"] == 4

    # again, in the same process: the folder is refused, and another one gets its own log
    with pytest.raises(UserError, match=r"holds another run.*in Python resume=True.*\(overwrite=True\)"):
        d2kd.distill("student.yaml", "teacher.yaml", "teacher.pth", output="distilled")
    log = result.paths["log"].read_text()
    again = d2kd.distill("student.yaml", "teacher.yaml", "teacher.pth", output=Path("second"), SOLVER__MAX_ITER=4)
    assert result.paths["log"].read_text() == log
    assert "Starting training" in again.paths["log"].read_text()
    other = torch.load(again.paths["weights"], weights_only=True)["model"]
    assert all(torch.equal(saved["model"][name], tensor) for name, tensor in other.items())
    done = d2kd.distill(
        "student.yaml", "teacher.yaml", "teacher.pth", output="second", resume=True, SOLVER={"MAX_ITER": 4}
    )
    assert done.metrics["bbox"].keys() == again.metrics["bbox"].keys()


def test_it_trains_what_the_command_trains(folder: Path, teacher: dict[str, Any]) -> None:
    ours = d2kd.distill("student.yaml", output="ours", **teacher, DATASETS__TEST=(), SOLVER__MAX_ITER=2)
    assert ours.metrics == {} and ours.teacher_metrics is None
    theirs = run_training(
        folder / "student.yaml", **teacher, DATASETS__TEST=(), SOLVER__MAX_ITER=2, OUTPUT_DIR="theirs"
    )
    a, b = ours.student.state_dict(), theirs.student.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_data_by_what_it_is(folder: Path) -> None:
    first = run("Data")["baseline"]
    (name,) = first.cfg.DATASETS.TRAIN
    assert name.startswith("train_") and first.metrics["bbox"]
    assert first.cfg.DISTILL.TEACHER.CONFIG_FILE == ""
    cfg = d2kd.load_config("student.yaml", data={"train": ["digits_train"], "test": "digits_val"})
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("digits_train",), ("digits_val",))
    assert len(cfg.DATASETS.REGISTER) == 2


def test_it_runs_beside_the_main_thread(folder: Path) -> None:
    results: list[Any] = []
    arguments = {"output": "beside", "SOLVER__MAX_ITER": 1, "DATASETS__TEST": ()}
    thread = threading.Thread(target=lambda: results.append(d2kd.train("student.yaml", **arguments)))
    thread.start()
    thread.join()
    assert results[0].paths["weights"].is_file()


# ---- keys and mistakes ----


def test_keys_in_every_form() -> None:
    cfg = d2kd.load_config(
        "configs/COCO/retinanet_R50_1x.yaml",
        methods="LogitKD",
        overrides={"SOLVER.MAX_ITER": 7, "SOLVER": {"BASE_LR": 1}},
        MODEL__DEVICE="cpu",
        TEST={"BEST_CHECKPOINT": {"METRIC": "bbox/AP"}},
        WANDB__NAME="10",  # text stays text
        SEED=3,
    )
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SEED) == (7, 1.0, 3)
    assert (cfg.TEST.BEST_CHECKPOINT.METRIC, cfg.WANDB.NAME, cfg.DISTILL.METHODS) == ("bbox/AP", "10", ["LogitKD"])


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"max_iter": 5}, r"distill\(\) has no argument 'max_iter'\. There is SOLVER__MAX_ITER\. Keys of the"),
        ({"teacher_weight": "x"}, r"Did you mean teacher_weights"),
        ({"SOLVER__MAXITER": 5}, r"Non-existent key: SOLVER\.MAXITER.*MAX_ITER"),
        ({"SOLVER__MAX_ITER": "many"}, r"SOLVER\.MAX_ITER"),
        ({"SOLVER__MAX_ITER": -1}, r"SOLVER\.MAX_ITER is -1; it must be at least"),
        ({"data": {"valid": "x"}}, r"data has 'valid'; it is \{\"train\": \.\.\., \"test\": \.\.\.\}"),
        ({"data": "folder"}, r"data has 'folder'"),
        ({"data": {"train": None}}, r'distill\(\): data\["train"\] has None; it is the name of a dataset, an entry of'),
        ({"data": {"train": ["digits_train", 5]}}, r'data\["train"\] has 5; it is'),
        ({"data": {"test": {"JSON": "a", 5: "b"}}}, r'data\["test"\] has \{'),
        ({"data": {"train": Path("train.json")}}, r'data\["train"\] has \w+Path\('),
        ({"data": {"train": {"FORMAT": "paper"}}}, r"FORMAT is 'paper'; it must be one of"),
        ({"teacher": "nowhere.yaml"}, r"CONFIG_FILE \(--teacher-config\) is 'nowhere\.yaml': there is no such file"),
        ({"teacher": None}, r"distill\(\) needs a teacher, and student\.yaml names none"),
        ({"methods": ["FeatureMimc"]}, r"Did you mean FeatureMimic"),
    ],
)
def test_mistakes_have_the_words_of_the_command(folder: Path, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        d2kd.distill("student.yaml", **{"teacher": "teacher.yaml", "teacher_weights": None, "output": "out", **keys})
    assert "\n" not in str(error.value)
    assert not os.path.exists("out/model_final.pth") and not handlers()


def test_a_student_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="--config-file is 'nowhere.yaml': there is no such file"):
        d2kd.train("nowhere.yaml")


# ---- a loop of one's own ----


def test_the_loop_runs_as_printed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    code = code_block(PAGE, "A loop of your own")
    assert len(code.splitlines()) <= 15
    names = run("A loop of your own")
    assert {name.partition("/")[0] for name in names["losses"]} == {"loss_cls", "loss_box_reg", "distill"}
    saved = torch.load("student.pth", weights_only=True)["model"]
    plain = build_model(names["cfg"])
    assert plain.load_state_dict(saved, strict=True) and not [name for name in saved if "distill" in name]
    assert d2kd.evaluate(names["cfg"], plain)["bbox"].keys() >= {"AP"}


def test_a_model_starts_from_its_weights_and_the_teacher(folder: Path) -> None:
    torch.save({"model": build_model(d2kd.load_config("student.yaml")).state_dict()}, "start.pth")
    start = torch.load("start.pth", weights_only=True)["model"]
    cfg = d2kd.load_config("student.yaml", "teacher.yaml", "teacher.pth", MODEL__WEIGHTS="start.pth")
    model = d2kd.build_distilled_model(cfg)
    state, teachers = model.student.state_dict(), model.teacher.model.state_dict()
    stem, head = "backbone.bottom_up.stem.conv1.weight", "head.cls_subnet.0.weight"
    assert torch.equal(state[stem], start[stem]) and torch.equal(state[head], teachers[head])
    assert not torch.equal(build_without_weights(cfg).student.state_dict()[head], teachers[head])
    alone = d2kd.load_config(
        "student.yaml",
        "teacher.yaml",
        "teacher.pth",
        MODEL__WEIGHTS="start.pth",
        DISTILL__INIT_FROM_TEACHER__ENABLED=False,
    )
    assert torch.equal(d2kd.build_distilled_model(alone).student.state_dict()[head], start[head])


def test_lengths_in_epochs_are_iterations_in_a_loop_of_ones_own(folder: Path) -> None:
    cfg = d2kd.load_config(
        "student.yaml", "teacher.yaml", "teacher.pth", SOLVER__MAX_EPOCHS=3.0, DISTILL={"SCHEDULE": {"SHAPE": "linear"}}
    )
    loader = d2kd.build_train_loader(cfg)
    assert cfg.SOLVER.MAX_EPOCHS == 0 and cfg.SOLVER.MAX_ITER > 1
    losses = d2kd.build_distilled_model(cfg)(next(iter(loader)))
    assert all(loss > 0 for name, loss in losses.items() if name.startswith("distill/"))


@pytest.mark.parametrize("method", sorted(name for name, _ in DISTILLERS if name not in ("ReceptiveTokens", "LD")))
def test_every_method_works_in_a_loop_without_a_storage(folder: Path, method: str) -> None:
    cfg = d2kd.load_config(
        "student.yaml",
        "teacher.yaml",
        "teacher.pth",
        methods=method,
        DISTILL={"BALANCE": "gradient", "CHANNEL_MATCHING": {"TRACK_IMAGES": 4}},
    )
    model, loader = d2kd.build_distilled_model(cfg), d2kd.build_train_loader(cfg)
    optimizer = d2kd.build_optimizer(cfg, model)
    for _, images in zip(range(2), loader):
        d2kd.calibrate(model, loader)
        losses = model(images)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert any(name.startswith(f"distill/{method}/") for name in losses)
    assert all(loss.isfinite() for loss in losses.values())


def test_without_a_gpu_the_device_falls_back_with_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("d2kd.config_reader._told", set())
    with caplog.at_level(logging.WARNING):
        cfg = d2kd.load_config("student.yaml", MODEL__DEVICE="cuda")
    assert cfg.MODEL.DEVICE == "cpu" and "there is no CUDA device here: this runs on the CPU" in caplog.text
