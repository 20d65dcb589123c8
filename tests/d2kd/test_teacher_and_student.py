"""Teacher and student evaluated by one command: what it returns, writes and logs, and what stops it beforehand."""

import json
import math
import re

import pytest
import torch
from models import config, model
from runs import run_training
from test_bad_input import error_of

from d2kd import cli, engine
from d2kd.cli import train
from d2kd.engine import DistillTrainer, argument_parser
from d2kd.evaluation.side_by_side import MAX_CLASSES, SHOWN_CLASSES, side_by_side


@pytest.fixture
def student_weights(tmp_path):
    torch.save({"model": model(config(MODEL__RETINANET__NUM_CLASSES=10), seed=3).state_dict()}, tmp_path / "s.pth")
    return tmp_path / "s.pth"


def evaluate(path, output, *flags, options=()):
    arguments = ["--config-file", path, *flags, "OUTPUT_DIR", output, *options]
    return train.main(argument_parser().parse_args(list(map(str, arguments))))


def result(folder):
    return json.loads((folder / "result.json").read_text())


def without_nan(metrics):
    return {task: {k: None if math.isnan(v) else v for k, v in of_task.items()} for task, of_task in metrics.items()}


def test_both_are_what_each_alone_is(write_config, teacher, student_weights, tmp_path):
    path, weights = write_config(**teacher), ["MODEL.WEIGHTS", student_weights]
    both = evaluate(path, tmp_path / "both", "--eval-only", "--eval-teacher", options=weights)
    table = (tmp_path / "both/log.txt").read_text().split("Teacher and student on digits_val:\n")[1]
    evaluate(path, tmp_path / "alone", "--eval-only", options=weights)
    evaluate(path, tmp_path / "alone", "--eval-teacher")
    assert set(both) == {"teacher", "student"}
    for name, folder in (("student", "."), ("teacher", "teacher")):
        one, other = result(tmp_path / "both" / folder), result(tmp_path / "alone" / folder)
        assert one == other and without_nan(both[name]) == one["metrics"]
        predictions = "inference/coco_instances_results.json"
        assert (tmp_path / "both" / folder / predictions).is_file()
    assert (tmp_path / "both/config.yaml").read_text() == (tmp_path / "alone/config.yaml").read_text().replace(
        str(tmp_path / "alone"), str(tmp_path / "both")
    )
    assert result(tmp_path / "both")["params"] < result(tmp_path / "both/teacher")["params"]
    names = re.findall(r"^\| (bbox/\S+)", table, re.MULTILINE)
    assert names[:3] == ["bbox/AP", "bbox/AP50", "bbox/AP75"] and names[-1] == "bbox/AP-9"
    student, of_teacher = both["student"]["bbox"]["AP50"], both["teacher"]["bbox"]["AP50"]
    want = ["bbox/AP50", f"{of_teacher:.2f}", f"{student:.2f}", f"{student - of_teacher:+.2f}"]
    assert [cell.strip() for cell in table.splitlines()[3].strip("|").split("|")] == want


def test_with_resume_the_student_is_the_last_checkpoint(write_config, teacher, tmp_path):
    path = write_config(**teacher)
    run_training(path)
    finished = result(tmp_path / "student")
    both = evaluate(path, tmp_path / "student", "--eval-only", "--eval-teacher", "--resume")
    assert without_nan(both["student"]) == finished["metrics"]
    assert result(tmp_path / "student") == finished and result(tmp_path / "student/teacher")["metrics"]


def test_expected_results_are_the_students_and_told_after_the_table(write_config, teacher, student_weights, tmp_path):
    options = ["MODEL.WEIGHTS", student_weights, "TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 99.0, 0.1]]"]
    with pytest.raises(SystemExit):
        evaluate(write_config(**teacher), tmp_path / "out", "--eval-only", "--eval-teacher", options=options)
    assert "Teacher and student on digits_val:\n" in (tmp_path / "out/log.txt").read_text()


def test_nothing_is_evaluated_where_one_of_both_does_not_fit(
    write_config, teacher, student_weights, tmp_path, monkeypatch
):
    monkeypatch.setattr(DistillTrainer, "test", lambda *_: pytest.fail("evaluated"))
    flags, weights = {"eval_only": True, "eval_teacher": True}, ("MODEL.WEIGHTS", student_weights)
    message = error_of(write_config(**teacher), tmp_path / "out", **flags)
    assert "nothing to evaluate" in message and "d2kd train --eval-teacher" in message
    assert "--teacher-config" in error_of(write_config(), tmp_path / "out", *weights, **flags)
    five = {
        "DISTILL__TEACHER__CONFIG_FILE": str(write_config("five", MODEL__RETINANET__NUM_CLASSES=5)),
        "DISTILL__TEACHER__WEIGHTS": str(tmp_path / "five.pth"),
    }
    torch.save({"model": model(config(MODEL__RETINANET__NUM_CLASSES=5)).state_dict()}, tmp_path / "five.pth")
    message = error_of(write_config(**{**teacher, **five}), tmp_path / "out", *weights, **flags)
    assert "not defined" in message and "5 classes" in message


@pytest.mark.parametrize(
    "command, flags, function",
    [
        ("eval", ["--eval-teacher"], "evaluate_teacher_and_student"),
        ("eval", [], "evaluate_student"),
        ("train", ["--eval-teacher"], "evaluate_teacher"),
    ],
)
def test_which_command_evaluates_what(write_config, teacher, student_weights, monkeypatch, command, flags, function):
    called = []
    for name in ("evaluate_student", "evaluate_teacher", "evaluate_teacher_and_student"):
        monkeypatch.setattr(engine, name, lambda *_, name=name: called.append(name))
    monkeypatch.setattr("sys.argv", ["d2kd"])
    options = ["MODEL.WEIGHTS", str(student_weights)]
    assert cli.main([command, *flags, "--config-file", str(write_config(**teacher)), *options]) == 0
    assert called == [function]


def rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_main_metrics_of_all_tasks_come_before_those_of_classes():
    teacher = {"classification": {"top1": 90.0, "top1-a": 100.0, "top1-b/c": 80.0}, "bbox": {"AP": math.nan}}
    student = {"classification": {"top1": 81.25, "top5": 99.0, "top1-a": 62.5}, "bbox": {"AP": 3.0}}
    header, _, *body = rows(side_by_side(teacher, student))
    assert [header, *body] == [
        ["metric", "teacher", "student", "difference"],
        ["classification/top1", "90.00", "81.25", "-8.75"],
        ["bbox/AP", "-", "3.00", "-"],
        ["classification/top5", "-", "99.00", "-"],
        ["classification/top1-a", "100.00", "62.50", "-37.50"],
        ["classification/top1-b/c", "80.00", "-", "-"],
    ]


def test_results_of_several_datasets_have_its_name_in_front():
    table = side_by_side({"one": {"bbox": {"AP": 1.0}}, "two": {"bbox": {"AP": 2.0}}}, {"two": {"bbox": {"AP": 5.5}}})
    assert rows(table)[2:] == [["one/bbox/AP", "1.00", "-", "-"], ["two/bbox/AP", "2.00", "5.50", "+3.50"]]


def test_of_many_classes_those_that_differ_most_are_shown():
    count = MAX_CLASSES + 1
    teacher = {"classification": {"top1": 50.0, **{f"top1-{c}": 50.0 for c in range(count)}}}
    student = {"classification": {"top1": 50.0, **{f"top1-{c}": 50.0 - c / 4 for c in range(count)}}}
    table = side_by_side(teacher, student)
    assert [row[0] for row in rows(table)[3:]] == [
        f"classification/top1-{c}" for c in range(count - 1, count - 1 - SHOWN_CLASSES, -1)
    ]
    assert table.endswith(f"Of {count} metrics of classes, the {SHOWN_CLASSES} that differ most; result.json has all.")
