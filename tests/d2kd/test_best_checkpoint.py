"""Best checkpoint, early stop, test-time augmentation and Weights & Biases: what happens around evaluations."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import same_tensors
from models import FASTER_RCNN, config
from runs import in_two_processes, read_checkpoint, run_training, tool

from d2kd.data.datasets import register_datasets
from d2kd.engine import DistillTrainer, load_config
from d2kd.engine.hooks.best import BestCheckpoint
from d2kd.engine.writers.wandb_writer import WandbWriter
from d2kd.errors import ConfigError, UserError
from d2kd.evaluation.build import check_evaluators
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage

#: AP of the evaluations after iterations 1, 3, 5, ... of the scripted trainings.
SCORES = [1.0, 3.0, 2.0, 3.1, 2.5, 9.0]
STOP = {
    "TEST__BEST_CHECKPOINT__METRIC": "bbox/AP",
    "TEST__EARLY_STOP__PATIENCE": 2,
    "TEST__EARLY_STOP__MIN_DELTA": 0.5,
    "TEST__EVAL_PERIOD": 2,
    "SOLVER__MAX_ITER": 12,
    "SOLVER__CHECKPOINT_PERIOD": 2,
}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Evaluations return SCORES by iteration; the list fills with the iterations that were evaluated."""
    evaluated: list[int] = []

    def test(cls: type[DistillTrainer], *arguments: Any) -> dict[str, Any]:
        iteration = get_event_storage().iter
        evaluated.append(iteration)
        return {"bbox": {"AP": SCORES[min(iteration // 2, len(SCORES) - 1)]}}

    monkeypatch.setattr(DistillTrainer, "test", classmethod(test))
    return evaluated


def judged(scores: list[float], **arguments: Any) -> BestCheckpoint:
    hook = BestCheckpoint("bbox/AP", **arguments)
    hook.trainer = SimpleNamespace(iter=0, save_best=lambda description: None)
    for iteration, score in enumerate(scores):
        hook.trainer.iter = iteration
        hook.judge({"bbox": {"AP": score}})
    return hook


def test_the_best_is_kept_and_patience_counts_rises_above_the_delta():
    assert judged(SCORES[:3], patience=2).describe() == {"metric": "bbox/AP", "value": 3.0, "iteration": 1}
    assert not judged(SCORES[:3], patience=2).exhausted
    # 3.1 is the best so far, but no rise by more than 0.5
    hook = judged(SCORES[:4], patience=2, min_delta=0.5)
    assert hook.exhausted and hook.best == 3.1
    assert not judged(SCORES[:4], patience=2).exhausted
    assert not judged([5.0] * 50).exhausted


def test_small_rises_add_up_to_one_that_counts():
    assert not judged([1.0, 1.3, 1.6, 1.9, 2.2], patience=2, min_delta=0.5).exhausted


def test_nan_is_never_the_best_and_counts_as_no_rise():
    hook = judged([float("nan"), 1.0, float("nan"), float("nan")], patience=2)
    assert hook.best == 1.0 and hook.exhausted


def test_unknown_metric_names_near_ones():
    with pytest.raises(ConfigError, match=r"TEST\.BEST_CHECKPOINT\.METRIC is 'bbox/AP'.*bbox/AP50"):
        hook = BestCheckpoint("bbox/AP")
        hook.trainer = SimpleNamespace(iter=0)
        hook.judge({"bbox": {"AP50": 1.0}})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"TEST__BEST_CHECKPOINT__METRIC": ""}, r"set TEST\.BEST_CHECKPOINT\.METRIC\b"),
        ({"TEST__EVAL_PERIOD": 0}, r"set TEST\.EVAL_PERIOD\b"),
        ({"DATASETS__TEST": []}, r"set DATASETS\.TEST\b"),
        ({"TEST__EARLY_STOP__PATIENCE": -1}, r"TEST\.EARLY_STOP\.PATIENCE is -1\b.*must not be negative"),
    ],
)
def test_settings_that_cannot_work_are_errors(changes, message):
    with pytest.raises(ConfigError, match=message):
        BestCheckpoint.from_config(config(**{"DATASETS__TEST": ["x"], **STOP, **changes}))


def test_training_stops_keeps_the_best_and_leaves_complete_results(write_config, tmp_path, scripted):
    path = write_config(**STOP)
    trainer = run_training(path)
    out = tmp_path / "student"
    assert scripted == [1, 3, 5, 7] and trainer.stopped_early
    best = read_checkpoint(out, "model_best")
    assert best["best"] == {"metric": "bbox/AP", "value": 3.1, "iteration": 7}
    assert same_tensors(best["model"], read_checkpoint(out, "model_0000007")["model"])
    final = read_checkpoint(out)
    assert final["iteration"] == 7 and same_tensors(final["model"], trainer.student.state_dict())
    result = json.loads((out / "result.json").read_text())
    assert result["stopped_early"] and result["iterations"] == 8 and result["metrics"]["bbox"]["AP"] == 3.1
    assert [json.loads(x)["iteration"] for x in (out / "metrics.json").read_text().splitlines()][-1] == 7
    (out / "result.json").unlink()  # killed before it wrote that: what is missing is made up for
    run_training(path, resume=True)
    assert json.loads((out / "result.json").read_text()) == {**result, "metrics": {"bbox": {"AP": 2.5}}}
    assert scripted.pop() == 8
    # a stopped run stays stopped, and with more patience goes on
    assert run_training(path, resume=True).iter == 7 and scripted == [1, 3, 5, 7]
    assert run_training(path, resume=True, TEST__EARLY_STOP__PATIENCE=4).start_iter == 8
    assert read_checkpoint(out, "model_best")["best"]["value"] == 9.0


def test_resumed_after_any_evaluation_it_stops_where_it_would_have(write_config, tmp_path, scripted):
    path = write_config(**STOP)
    run_training(path)
    for done in (2, 4, 6):
        (tmp_path / "student/last_checkpoint").write_text(f"model_{done - 1:07d}.pth")
        trainer = run_training(path, resume=True)
        assert trainer.start_iter == done and trainer.stopped_early and trainer.iter == 7


def test_without_patience_it_runs_to_the_end_and_judges_the_last_evaluation_too(write_config, tmp_path, scripted):
    run_training(write_config(**{**STOP, "TEST__EARLY_STOP__PATIENCE": 0}))
    assert scripted == [1, 3, 5, 7, 9, 12]
    assert read_checkpoint(tmp_path / "student", "model_best")["best"]["value"] == 9.0
    assert (tmp_path / "student/last_checkpoint").read_text().strip() == "model_final.pth"


def test_a_metric_of_the_average_keeps_the_average(write_config, tmp_path):
    changes = {"TEST__BEST_CHECKPOINT__METRIC": "bbox_EMA/AP", "SOLVER__EMA__ENABLED": True, "SOLVER__EMA__DECAY": 0.5}
    trainer = run_training(write_config(**changes))
    best = read_checkpoint(tmp_path / "student", "model_best")["model"]
    assert same_tensors(best, trainer.ema.model.state_dict()) and not same_tensors(best, trainer.student.state_dict())


def _stop_in_two(path: str) -> None:
    torch.set_num_threads(1)
    cfg = load_config(path)
    register_datasets(cfg)
    trainer = DistillTrainer(cfg)
    flat = [{"bbox": {"AP": score}} for score in SCORES]
    trainer.evaluation.run = lambda: flat[trainer.iter // 2] if comm.is_main_process() else {}
    trainer.resume_or_load(resume=False)
    trainer.train()
    iterations = comm.all_gather((trainer.iter, trainer.stopped_early))
    assert iterations == [(7, True), (7, True)]


def test_all_processes_stop_together(write_config, tmp_path):
    in_two_processes(_stop_in_two, write_config(**STOP))
    assert read_checkpoint(tmp_path / "student")["iteration"] == 7


RCNN = {
    **{k.replace(".", "__"): v for k, v in FASTER_RCNN.items()},
    "MODEL__ROI_HEADS__NUM_CLASSES": 10,
    "MODEL__ROI_HEADS__SCORE_THRESH_TEST": 0.0,
    "TEST__AUG__ENABLED": True,
    "TEST__AUG__MIN_SIZES": [64, 96],
    "TEST__AUG__MAX_SIZE": 96,
    "SOLVER__MAX_ITER": 1,
}


def test_augmented_evaluation_comes_at_the_end_and_with_eval_only(write_config, tmp_path):
    path = write_config(**RCNN)
    trainer = run_training(path)
    result = json.loads((tmp_path / "student/result.json").read_text())["metrics"]
    assert {"bbox", "bbox_TTA"} <= set(result)
    assert (tmp_path / "student/inference_TTA/coco_instances_results.json").is_file()
    log = (tmp_path / "student/metrics.json").read_text()
    assert '"bbox_TTA/AP"' in log
    weights_file = tmp_path / "student/model_final.pth"
    done = tool("train_net", "--config-file", path, "--eval-only", "MODEL.WEIGHTS", weights_file)
    assert "Evaluating the variant TTA" in done.stdout
    direct = DistillTrainer.test_with_tta(trainer.cfg, trainer.student)["bbox_TTA"]
    written = {k: float("nan") if v is None else v for k, v in result["bbox_TTA"].items()}
    assert direct == pytest.approx(written, nan_ok=True)


def test_augmentation_of_a_dense_detector_is_an_error_before_training(write_config):
    with pytest.raises(ConfigError, match=r"TEST\.AUG\.ENABLED: .* MODEL\.META_ARCHITECTURE RetinaNet\b"):
        run_training(write_config(TEST__AUG__ENABLED=True))


class FakeRun:
    """What wandb.init returns, as far as it is used."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.id = arguments["id"] or "new"
        self.logged: list[Any] = []
        self.finished = False

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    runs: list[FakeRun] = []

    def init(**arguments: Any) -> FakeRun:
        runs.append(FakeRun(**arguments))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=object()))
    return runs


def test_wandb_gets_every_scalar_once_with_its_iteration(wandb, tmp_path):
    cfg = config(WANDB__ENABLED=True, WANDB__PROJECT="digits", OUTPUT_DIR=str(tmp_path / "run7"))
    Path(cfg.OUTPUT_DIR).mkdir()
    writer = WandbWriter(cfg, resumed=lambda: False)
    with EventStorage(0) as storage:
        for i in range(3):
            storage.iter = i
            storage.put_scalar("x", float(i), smoothing_hint=False)
            writer.write()
        writer.write()
    writer.close()
    (made,) = wandb
    assert made.logged == [(0, {"x": 0.0}), (1, {"x": 1.0}), (2, {"x": 2.0})] and made.finished
    assert made.arguments["project"] == "digits" and made.arguments["name"] == "run7"
    assert made.arguments["config"]["SOLVER"]["BASE_LR"] == cfg.SOLVER.BASE_LR


def test_a_resumed_training_continues_its_wandb_run(wandb, write_config):
    path = write_config(WANDB__ENABLED=True)
    run_training(path, stop_at=3)
    wandb[0].id = "changed"
    run_training(path, resume=True)
    run_training(path)
    assert [r.arguments["id"] for r in wandb] == [None, "new", None]
    assert any("bbox/AP" in values for _, values in wandb[1].logged)


def test_wandb_that_is_not_installed_is_an_error_before_training(write_config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="wandb is not installed"):
        run_training(write_config(WANDB__ENABLED=True))


def test_best_file_loads_in_a_plain_model(write_config, tmp_path, scripted):
    path = write_config(**{**STOP, "SOLVER__MAX_ITER": 2})
    run_training(path)
    student = build_model(load_config(str(path)))
    student.load_state_dict(read_checkpoint(tmp_path / "student", "model_best")["model"])


@pytest.mark.parametrize("classes, known", [(1, False), (2, True)])
def test_a_metric_of_a_class_is_none_where_there_is_one_class(classes, known):
    DatasetCatalog.register("few", lambda: [])
    MetadataCatalog.get("few").set(evaluator_type="coco", thing_classes=list("ab")[:classes], json_file="")
    try:
        cfg = config(DATASETS__TEST=["few"], TEST__BEST_CHECKPOINT__METRIC="bbox/AP-a")
        if known:
            check_evaluators(cfg)
            return
        with pytest.raises(UserError, match="bbox/AP-a"):
            check_evaluators(cfg)
    finally:
        DatasetCatalog.remove("few")
        MetadataCatalog.remove("few")
