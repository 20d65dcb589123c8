"""What the log says early: lines of the first iterations, and why a metric is nan."""

import json
import logging
import math

import pytest
import torch
from runs import run_training

from d2kd.engine import DistillTrainer
from d2kd.engine.hooks import ProgressWriter
from d2kd.evaluation.missing import explain_nan
from detectron2.utils.events import CommonMetricPrinter, EventStorage, EventWriter

pytestmark = pytest.mark.usefixtures("forget_datasets")

NAN = math.nan


class Trainer:
    """What the hook sees of a trainer."""

    def __init__(self, start, end):
        self.start_iter, self.max_iter, self.iter = start, end, start


def written(start, end, period=20):
    """The iterations, counted from 1, after which the log and the files get a line."""

    class Printer(CommonMetricPrinter):
        def write(self):
            lines.append(trainer.iter + 1)

    class File(EventWriter):
        def write(self):
            files.append(trainer.iter + 1)

    lines, files, trainer = [], [], Trainer(start, end)
    hook = ProgressWriter([Printer(), File()], period)
    hook.trainer = trainer
    for trainer.iter in range(start, end):
        hook.after_step()
    return lines, files


def test_the_log_has_lines_of_the_first_and_the_fifth_iteration():
    assert written(0, 45) == ([1, 5, 20, 40, 45], [20, 40, 45])
    assert written(0, 5) == ([1, 5], [5])
    assert written(0, 1) == ([1], [1])
    assert written(0, 12, period=5) == ([1, 5, 10, 12], [5, 10, 12])
    assert written(30, 45) == ([31, 35, 40, 45], [40, 45])  # a run that is resumed


def test_a_training_logs_them(write_config, teacher, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        trainer = run_training(
            write_config(**teacher, DISTILL__METHODS=["FeatureMimic"], DATASETS__TEST=(), SOLVER__MAX_ITER=7)
        )
    lines = [record.getMessage() for record in caplog.records]
    assert [int(line.split("iter: ")[1].split()[0]) for line in lines if "iter: " in line] == [0, 4, 6]
    assert len([line for line in lines if line.startswith(" FeatureMimic: p3 ")]) == 3
    metrics = [json.loads(line)["iteration"] for line in (tmp_path / "student/metrics.json").read_text().splitlines()]
    assert metrics == [6] and any(isinstance(hook, ProgressWriter) for hook in trainer._hooks)


# ---- nan ----


def test_no_predictions_are_explained():
    results = {"bbox": {"AP": NAN, "AP50": NAN}, "segm": {"AP": 3.0}}
    (line,) = explain_nan(results, "my_val", {"bbox"}, "MODEL.RETINANET.SCORE_THRESH_TEST 0.05")
    assert line.startswith("bbox is nan: the model has found nothing in my_val with a score above MODEL.RETINANET.")
    assert "Early in a training that is usual" in line and "\n" not in line


@pytest.mark.parametrize(
    "metrics, reasons",
    [
        ({"AP": 3.0, "AP-cat": 3.0}, []),
        ({"AP": 3.0, "APl": NAN}, ["APl is nan, as my_val has no large objects (from 96x96)"]),
        ({"AP": 3.0, "APs": NAN, "AP-cat": NAN, "AP-dog": 3.0}, ["APs is nan", "nan for cat, of which my_val has no"]),
        ({"AP": NAN, "AP50": NAN, "APs": NAN}, ["AP is nan, as my_val has no ground truth for it"]),
        ({"mIoU": 3.0, "IoU-car": NAN, "ACC-car": NAN}, ["nan for car, of which"]),
        ({"min(IoU, B-Iou)": 3.0, "min(IoU, B-Iou)-T-bar": NAN}, ["task: nan for T-bar, of which"]),
        ({"min(IoU, B-Iou)": NAN}, ["min(IoU, B-Iou) is nan, as my_val has no ground truth"]),
        ({"top1": 3.0, **{f"top1-{n}": NAN for n in range(7)}}, ["nan for 0, 1, 2, 3, 4 and 2 more, of which"]),
        ({"AR@100": 3.0, "note": "text"}, []),
    ],
)
def test_reasons(metrics, reasons):
    lines = explain_nan({"task": metrics}, "my_val")
    assert len(lines) == bool(reasons) and all(reason in lines[0] for reason in reasons)


def test_sizes_are_no_reason_where_nothing_is_there():
    (line,) = explain_nan({"bbox": {"AP": NAN, "APs": NAN}}, "my_val")
    assert "small" not in line


def test_evaluations_explain_what_they_give(write_config, tmp_path, caplog):
    """Of no predictions, then of the real ones: small images have no large objects."""
    options = {"SOLVER__MAX_ITER": 1, "SOLVER__STEPS": ()}
    with caplog.at_level(logging.INFO):
        run_training(write_config(**options, MODEL__RETINANET__SCORE_THRESH_TEST=0.99))
    assert "bbox is nan: the model has found nothing in digits_val with a score above " in caplog.text
    assert "MODEL.RETINANET.SCORE_THRESH_TEST 0.99" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        run_training(write_config("second", **options))
    (line,) = [
        r.getMessage() for r in caplog.records if r.name == "d2kd.engine.evaluation" and "is nan" in r.getMessage()
    ]
    assert (
        "APl is nan, as digits_val has no large objects" in line and "nan for " in line and "found nothing" not in line
    )


def test_metrics_are_as_they_were(write_config, monkeypatch):
    """The first lines measure nothing: the state of a run is the same with and without them."""
    first = run_training(write_config("a", DATASETS__TEST=()))
    monkeypatch.setattr("d2kd.engine.hooks.progress._FIRST", ())
    second = run_training(write_config("b", DATASETS__TEST=()), trainer_class=DistillTrainer)
    states = first.student.state_dict(), second.student.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert isinstance(first.storage, EventStorage)
