"""Columns of a report: time of an iteration, the teacher's share, and time until the same result."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import d2kd  # noqa: F401
from d2kd.evaluation.report import ModelResult, write_report
from d2kd.evaluation.seeds import merge_seeds
from d2kd.evaluation.training_cost import training_cost
from d2kd.modeling.teacher_passes.clock import TeacherClock


def run(folder: Path, name: str, curve: dict[int, float], seconds: float, teacher: float | None) -> ModelResult:
    """A run with an AP at some iterations, each of which took so many seconds, and the teacher's part of them."""
    path = folder / f"{name}.json"
    rows: list[dict[str, Any]] = [{"iteration": i, "wall_time": seconds * (i + 1)} for i in range(0, 100, 20)]
    rows += [{"iteration": i, "bbox/AP": value} for i, value in curve.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wall = 100 * seconds
    taken = None if teacher is None else teacher * wall
    final = {"AP": curve[max(curve)]}
    return ModelResult(
        name, final, metrics_file=str(path), wall_time_s=wall, teacher_time_s=taken, iterations=100, images_per_batch=2
    )


def students(folder: Path) -> dict[str, ModelResult]:
    """A baseline, and a distilled student that is slower by an iteration and sooner as good."""
    return {
        "baseline": run(folder, "baseline", {29: 5.0, 59: 10.0, 79: 20.0}, 60.0, None),
        "distilled": run(folder, "distilled", {29: 15.0, 59: 22.0, 79: 30.0}, 90.0, 0.25),
    }


def test_costs_are_those_of_the_runs(tmp_path):
    models = students(tmp_path)
    cost = training_cost(models, "bbox", "AP")
    assert cost is not None and cost["level"] == 20.0
    baseline, distilled = cost["models"]["baseline"], cost["models"]["distilled"]
    assert baseline == {"iteration_s": 60.0, "teacher_share": None, "to_level_s": pytest.approx(60 * 80)}
    assert distilled == {"iteration_s": 90.0, "teacher_share": 0.25, "to_level_s": pytest.approx(90 * 60)}


def test_a_teacher_has_no_part_in_the_time_to_the_same_result(tmp_path):
    models = {"teacher": ModelResult("teacher", {"AP": 1.0}), **students(tmp_path)}
    cost = training_cost(models, "bbox", "AP")
    assert cost is not None and cost["level"] == 20.0
    assert cost["models"]["teacher"] == {"iteration_s": None, "teacher_share": None, "to_level_s": None}
    alone = training_cost({"distilled": models["distilled"]}, "bbox", "AP")
    assert alone is not None and alone["level"] is None


def test_of_several_seeds_it_is_the_mean(tmp_path):
    first, second = (
        students(tmp_path),
        {
            "baseline": run(tmp_path, "baseline2", {29: 5.0, 79: 21.0}, 60.0, None),
            "distilled": run(tmp_path, "distilled2", {29: 21.0, 79: 30.0}, 110.0, 0.35),
        },
    )
    models = {name: merge_seeds([first[name], second[name]]) for name in first}
    cost = training_cost(models, "bbox", "AP")
    assert cost is not None and cost["level"] == 20.0
    assert cost["models"]["distilled"] == {
        "iteration_s": pytest.approx(100.0),
        "teacher_share": pytest.approx((0.25 * 90 + 0.35 * 110) / 200),
        "to_level_s": pytest.approx((90 * 60 + 110 * 30) / 2),
    }


def test_the_report_has_the_columns_where_a_run_has_told(tmp_path):
    models = students(tmp_path)
    report = write_report(str(tmp_path / "report"), models, environment={})
    text, page = (Path(tmp_path, "report", f"report.{kind}").read_text() for kind in ("md", "html"))
    header, _, first, second = [line for line in text.splitlines() if line.startswith("|")][:4]
    assert "| an iteration | teacher's share | time to 20.0 AP |" in header
    assert "| 60,000 ms | - | 1 h 20 min |" in first and "| 90,000 ms | 25 % | 1 h 30 min |" in second
    assert "25 %" in page and report["training_cost"]["level"] == 20.0
    untold = {name: ModelResult(name, {"AP": 1.0}) for name in ("baseline", "distilled")}
    write_report(str(tmp_path / "untold"), untold, environment={})
    assert "teacher's share" not in Path(tmp_path, "untold/report.md").read_text()


def test_a_clock_that_nobody_reads_keeps_what_is_under_way_alone(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            self.done = True

        def record(self):
            pass

        def query(self):
            return self.done

        def elapsed_time(self, end):
            return 500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = TeacherClock()
    for _ in range(10):
        with clock(torch.device("cuda")):
            pass
    assert len(clock._running) == 1 and clock.take() == pytest.approx(5.0) and clock.take() == 0


@pytest.mark.parametrize(
    "trained_on, said",
    [
        (("va", "va"), "Curves of AP are of va, and the tables of vb."),
        (("va", "vb"), "not to be compared: va (baseline student); vb (distilled student). The tables are of vb."),
        (("vb", "vb"), ""),
        (("va", None), "va (baseline student); a dataset that is not known (distilled student). The"),
    ],
)
def test_curves_of_another_dataset_do_not_tell_the_time_to_a_metric(tmp_path, trained_on, said):
    models = {
        name: replace(model, dataset="vb", curve_dataset=dataset)
        for (name, model), dataset in zip(students(tmp_path).items(), trained_on)
    }
    report = write_report(str(tmp_path / "report"), models, environment={})
    assert report["training_cost"]["level"] == (None if said else 20.0)
    for kind in ("md", "html"):
        text = Path(tmp_path, "report", f"report.{kind}").read_text()
        assert (said in text and "time to" not in text) if said else "Curves of AP" not in text
