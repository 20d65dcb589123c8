"""benchmarks/accuracy.py: the commands of its suites, where their runs lie, and the tables it makes of them."""

import ast
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT


@pytest.fixture
def accuracy(monkeypatch, tmp_path):
    """The program, in a directory of its own, with runs that end at once; the trainings that it has run.

    Students gain a point a seed, what is distilled another 20, and test is a point above val.
    """
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = runpy.run_path(str(ROOT / "benchmarks/accuracy.py"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "docs").mkdir()
    started = []

    def start(command, **_):
        line = command[1:]
        started.append(line)
        if "OUTPUT_DIR" in line:
            output = Path(line[line.index("OUTPUT_DIR") + 1])
            folder = output.parent if output.name == "evaluation" else output
            score = 89.0 if folder.name == "teacher" else 49.0 if "baseline" in str(folder) else 69.0
            score += int(folder.name.removeprefix("seed") or 0) if folder.name.startswith("seed") else 0
            values = {n: {"bbox": {"AP": score + n}, "classification": {"top1": score + n}} for n in (0, 1)}
            content = {"metrics": values[0]}
            if output.name == "evaluation":
                names = line[line.index("DATASETS.TEST") + 1]
                assert "--eval-only" in line and str(folder / "model_final.pth") in line
                datasets = ast.literal_eval(names)
                content = {"datasets": datasets, "metrics": {n: values[n.endswith("test")] for n in datasets}}
                if len(datasets) == 1:
                    content["metrics"] = values[0]
            (output / "result.json").write_text(json.dumps(content))
            (output / "tokens.pth").touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", start)

    def run(*arguments, evaluations=False):
        started.clear()
        monkeypatch.setattr(sys, "argv", ["accuracy.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            module["main"]()
        assert stop.value.code == 0, started
        lines = [line for line in started if "OUTPUT_DIR" in line]
        return [line for line in lines if ("--eval-only" in line) == evaluations]

    return run


#: What finished runs of the first suite have in their command.json; they are to be found again.
RECORDED = {
    "teacher": "tools/train_net.py --resume --config-file configs/PhotoDigits/retinanet_teacher.yaml "
    "SOLVER.MAX_ITER 1000 SOLVER.IMS_PER_BATCH 16 TEST.EVAL_PERIOD 0 OUTPUT_DIR output/accuracy/short/teacher",
    "tokens": "tools/learn_tokens.py --resume --config-file configs/PhotoDigits/retinanet_teacher_tokens.yaml "
    "MODEL.WEIGHTS output/accuracy/short/teacher/model_final.pth OUTPUT_DIR output/accuracy/short/tokens",
    "baseline/seed2": "tools/train_net.py --resume --config-file configs/PhotoDigits/retinanet_student.yaml SEED 2 "
    "SOLVER.MAX_ITER 700 TEST.EVAL_PERIOD 0 OUTPUT_DIR output/accuracy/short/baseline/seed2",
    "ReceptiveTokens/seed2": "tools/train_net.py --resume --config-file "
    "configs/PhotoDigits/retinanet_student_ReceptiveTokens.yaml --teacher-config "
    "configs/PhotoDigits/retinanet_teacher.yaml --teacher-weights output/accuracy/short/teacher/model_final.pth "
    "SEED 2 SOLVER.MAX_ITER 700 TEST.EVAL_PERIOD 0 DISTILL.TEACHER.EVAL_FIRST False DISTILL.RECEPTIVE_TOKENS.FILE "
    "output/accuracy/short/tokens/tokens.pth OUTPUT_DIR output/accuracy/short/ReceptiveTokens/seed2",
}


def test_finished_runs_of_the_first_suite_are_found(accuracy, tmp_path):
    arguments = ("--seeds", 2, "--only", "baseline", "ReceptiveTokens")
    assert sorted(map(" ".join, accuracy(*arguments))) == sorted(RECORDED.values())
    for folder, line in RECORDED.items():
        recorded = json.loads((tmp_path / "output/accuracy/short" / folder / "command.json").read_text())
        assert recorded == line.split()
    assert accuracy(*arguments) == []


def test_a_suite_has_folders_of_its_own_and_may_share_a_teacher(accuracy):
    accuracy("--seeds", 1, "--only", "baseline")
    lines = accuracy("--suite", "mobilenet", "--seeds", 1, "--only", "baseline", "FeatureMimic")
    assert [line[-1] for line in lines] == [
        f"output/accuracy/mobilenet/short/{row}/seed1" for row in ("baseline", "FeatureMimic")
    ]
    (weights,) = [line[line.index("--teacher-weights") + 1] for line in lines if "--teacher-weights" in line]
    assert weights == "output/accuracy/short/teacher/model_final.pth"


def test_lengths_with_equal_teachers_train_one(accuracy):
    """The long runs are of the medium ones' teacher and tokens."""
    accuracy("--length", "medium", "--seeds", 1, "--only", "ReceptiveTokens")
    (line,) = accuracy("--length", "long", "--seeds", 1, "--only", "ReceptiveTokens")
    assert line[line.index("--teacher-weights") + 1] == "output/accuracy/medium/teacher/model_final.pth"
    assert "output/accuracy/medium/tokens/tokens.pth" in line


def test_classifiers_have_their_teacher_and_their_table(accuracy, tmp_path):
    length = runpy.run_path(str(ROOT / "benchmarks/suites.py"))["SUITES"]["classification"].lengths["short"]
    page = tmp_path / "docs/accuracy.md"
    page.write_text("a\n<!-- accuracy classification short -->\nold\n<!-- /accuracy classification short -->\nb\n")
    lines = accuracy("--suite", "classification", "--seeds", 1, 2, "--only", "baseline", "LogitKD")
    root, recipe = "output/accuracy/classification/short", "configs/PhotoDigits/classifier"
    assert sorted(line[-1] for line in lines) == sorted(
        [f"{root}/teacher", *(f"{root}/{row}/seed{seed}" for row in ("baseline", "LogitKD") for seed in (1, 2))]
    )
    (teacher,) = [line for line in lines if line[-1].endswith("teacher")]
    steps = f"SOLVER.MAX_ITER {length.teacher} SOLVER.IMS_PER_BATCH {length.teacher_images}"
    assert f"{recipe}_teacher.yaml {steps}" in " ".join(teacher)
    student = " ".join(next(line for line in lines if line[-1].endswith("LogitKD/seed1")))
    assert f"{recipe}_student_LogitKD.yaml --teacher-config {recipe}_teacher.yaml --teacher-weights {root}/t" in student
    assert f"SOLVER.MAX_ITER {length.student} " in student
    assert f"SOLVER.IMS_PER_BATCH {length.student_images} " in student
    assert page.read_text().splitlines() == [
        "a",
        "<!-- accuracy classification short -->",
        f"Teacher: 90.0 % top-1 after {length.teacher:,} iterations of {length.teacher_images} images; students: "
        f"{length.student:,} iterations of {length.student_images}. On test.",
        "",
        "| run | seeds | % top-1 (mean) | lowest to highest | over baseline | gap closure |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| baseline | 2 | 51.5 | 51.0 to 52.0 | - | - |",
        "| LogitKD | 2 | 71.5 | 71.0 to 72.0 | +20.0 [+20.0, +20.0] | 52 [45, 62] % |",
        "<!-- /accuracy classification short -->",
        "b",
    ]


def test_finished_runs_are_evaluated_once_on_val_and_test(accuracy, tmp_path):
    arguments = ("--suite", "classification", "--seeds", 1, "--only", "baseline")
    first, second = accuracy(*arguments, evaluations=True)
    root, data = "output/accuracy/classification/short", "photo_digits_classification"
    assert [line[-1] for line in (first, second)] == [f"{root}/teacher/evaluation", f"{root}/baseline/seed1/evaluation"]
    assert second[second.index("DATASETS.TEST") + 1] == f"['{data}_val', '{data}_test']"
    assert accuracy(*arguments, evaluations=True) == []
    for path in tmp_path.glob(f"{root}/*/**/dataset.json"):
        path.write_text('"of another dataset"')
    assert len(accuracy(*arguments, evaluations=True)) == 2
    os.utime(tmp_path / root / "baseline/seed1/result.json", (2e9, 2e9))  # trained again
    assert [line[-1] for line in accuracy(*arguments, evaluations=True)] == [f"{root}/baseline/seed1/evaluation"]


def test_evaluate_only_trains_nothing_and_tables_what_is_there(accuracy, tmp_path):
    page = tmp_path / "docs/accuracy.md"
    before = "<!-- accuracy short -->\nold\n<!-- /accuracy short -->\n"
    page.write_text(before)
    assert accuracy("--evaluate-only", evaluations=True) == accuracy("--evaluate-only") == []
    assert page.read_text() == before  # nothing is finished
    accuracy("--seeds", 1, 2, 3, "--only", "baseline", "inherit only", "FeatureMimic")
    for path in tmp_path.glob("output/accuracy/short/**/evaluation/result.json"):
        path.unlink()
    (tmp_path / "benchmarks/results/accuracy.json").unlink()
    assert len(accuracy("--evaluate-only", "--seeds", 1, 2, evaluations=True)) == 7
    table = json.loads((tmp_path / "output/accuracy/short/table.json").read_text())
    mimic = table["rows"]["FeatureMimic"]
    assert mimic["scores"] == {"1": {"val": 70, "test": 71}, "2": {"val": 71, "test": 72}}
    assert table["teacher"] == {"val": 89, "test": 90} and mimic["over_baseline"]["mean"] == 20
    assert mimic["over_baseline"]["within_noise"] is False and mimic["over_inherit_only"]["within_noise"] is True
    assert "| FeatureMimic | 2 | 71.5 | 71.0 to 72.0 | +20.0 [+20.0, +20.0] | +0.0 [+0.0, +0.0], noise |" in (
        page.read_text()
    )


def test_a_run_that_diverged_is_counted_and_is_in_no_mean(accuracy, tmp_path):
    page, root = tmp_path / "docs/accuracy.md", tmp_path / "output/accuracy/short"
    page.write_text("<!-- accuracy short -->\n<!-- /accuracy short -->\n")
    accuracy("--seeds", 1, 2, 3, "--only", "baseline", "FeatureMimic", "--no-document")
    result = root / "baseline/seed2/evaluation/result.json"
    content = json.loads(result.read_text())
    for metrics in content["metrics"].values():
        metrics["bbox"]["AP"] = 0.1
    result.write_text(json.dumps(content))
    accuracy("--evaluate-only")
    rows = json.loads((root / "table.json").read_text())["rows"]
    assert rows["baseline"]["diverged"] == [2] and rows["FeatureMimic"]["diverged"] == []
    assert rows["FeatureMimic"]["over_baseline"]["mean"] == 20 and rows["FeatureMimic"]["over_baseline"]["count"] == 2
    assert "| baseline | 2, 1 diverged | 52.0 | 51.0 to 53.0 |" in page.read_text()
    recorded = json.loads((tmp_path / "benchmarks/results/accuracy.json").read_text())["accuracy short"]
    assert recorded["rows"]["baseline"]["seeds"]["2"]["scores"]["test"] == 0.1
    for seed in (1, 2, 3):  # without a detection there is no AP
        for metrics in content["metrics"].values():
            metrics["bbox"]["AP"] = None if seed < 3 else 0.0
        (root / f"baseline/seed{seed}/evaluation/result.json").write_text(json.dumps(content))
    (tmp_path / "benchmarks/results/accuracy.json").unlink()
    accuracy("--evaluate-only")
    rows = json.loads((root / "table.json").read_text())["rows"]
    assert rows["baseline"]["diverged"] == [1, 2, 3] and rows["FeatureMimic"]["over_baseline"] is None
    assert "| baseline | 0, 3 diverged | - | - |" in page.read_text()


def test_a_seed_of_another_command_is_left_out(accuracy, tmp_path, caplog):
    arguments = ("--suite", "classification", "--only", "baseline", "--seeds")
    accuracy(*arguments, 1, 2)
    record = tmp_path / "output/accuracy/classification/short/baseline/seed2/command.json"
    record.write_text(record.read_text().replace('"400"', '"800"'))
    accuracy(*arguments, 1)
    table = json.loads((record.parents[2] / "table.json").read_text())
    assert list(table["rows"]["baseline"]["scores"]) == ["1"]


def test_a_cache_of_features_makes_no_other_row(accuracy, tmp_path):
    arguments = ("--only", "baseline", "FeatureMimic", "FeatureMimic, kept in int8", "--seeds")
    accuracy(*arguments, 1)
    started = accuracy(*arguments, 2, "--cache")
    assert [run.count("DISTILL.CACHE.DIR") for run in started] == [0, 1, 1]
    assert not accuracy(*arguments, 1, 2) and not accuracy(*arguments, 1, 2, "--cache")
    table = json.loads((tmp_path / "output/accuracy/short/table.json").read_text())
    assert [list(row["scores"]) for row in table["rows"].values()] == [["1", "2"]] * 3


def test_runs_that_are_gone_stay_in_the_table_of_their_teacher(accuracy, tmp_path):
    (tmp_path / "docs/accuracy.md").write_text("<!-- accuracy short -->\n<!-- /accuracy short -->\n")
    record, root = tmp_path / "benchmarks/results/accuracy.json", tmp_path / "output/accuracy/short"

    def rows():
        found = json.loads((root / "table.json").read_text())["rows"]
        return {name: list(row["scores"]) for name, row in found.items()}

    accuracy("--seeds", 1, 2, "--only", "baseline", "FeatureMimic")
    (recorded,) = json.loads(record.read_text()).values()
    assert recorded["teacher"] == {"val": 89, "test": 90}
    assert recorded["rows"]["FeatureMimic"]["seeds"]["2"] == {"scores": {"val": 71, "test": 72}, "commit": ""}
    shutil.rmtree(root)
    accuracy("--output", tmp_path / "elsewhere", "--seeds", 3, "--only", "FeatureMimic")
    shutil.move(tmp_path / "elsewhere/short", root)
    assert rows() == {"baseline": ["1", "2"], "FeatureMimic": ["1", "2", "3"]}
    shutil.rmtree(root)
    accuracy("--seeds", 4, "--only", "FeatureMimic", "--no-document", "--", "SOLVER.BASE_LR", 0.1)
    assert rows() == {"baseline": ["1", "2"], "FeatureMimic": ["4"]}
    for change in ({"teacher": {"val": 89, "test": 91}}, {"dataset": "another"}):
        record.write_text(json.dumps({"accuracy short": {**recorded, **change}}))
        shutil.rmtree(root)
        accuracy("--seeds", 1, "--only", "FeatureMimic", "--no-document")
        assert rows() == {"FeatureMimic": ["1"]}
    accuracy("--seeds", 1, "--only", "FeatureMimic")
    assert json.loads(record.read_text())["accuracy short"]["rows"].keys() == {"FeatureMimic"}


def test_a_teacher_may_have_learned_from_another_one(accuracy):
    lines = accuracy("--suite", "masked-classification", "--seeds", 1, "--only", "half of it, by the student")
    root, recipe = "output/accuracy/masked-classification/short", "configs/PhotoDigits/classifier"
    assert [line[-1] for line in lines] == [
        f"{root}/{name}" for name in ("grand_teacher", "teacher", "half_of_it_by_the_student/seed1")
    ]
    first, teacher, student = map(" ".join, lines)
    assert f"{recipe}_resnet_32.yaml TEST.EVAL_PERIOD 0" in first
    weights = f"--teacher-config {recipe}_resnet_32.yaml --teacher-weights {root}/grand_teacher/model_final.pth"
    assert f"{recipe}_vit_teacher.yaml {weights}" in teacher
    assert f"--teacher-config {recipe}_vit_teacher.yaml --teacher-weights {root}/teacher/model_final.pth" in student


def test_weights_are_tried_for_the_rows_of_a_suite(accuracy, tmp_path):
    lines = accuracy("--suite", "classification", "--tune", "--only", "LogitKD", "baseline")
    root = "output/accuracy/classification/short"
    trials = [f"{root}/tuning/LogitKD/{weight}" for weight in ("0.25", "1", "4", "16")]
    assert [line[-1] for line in lines] == [f"{root}/teacher", *trials]
    for trial in trials:  # what chooses does not see test
        assert json.loads((tmp_path / trial / "evaluation/result.json").read_text())["datasets"] == [
            "photo_digits_classification_val"
        ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--suite", "classification", "--length", "long"], "the suite classification has short"),
        (
            ["--suite", "mobilenet", "--only", "LogitKD"],
            "--only LogitKD: the suite mobilenet has baseline, default",
        ),
    ],
)
def test_what_a_suite_lacks_is_an_error(monkeypatch, capsys, arguments, message):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "benchmarks/accuracy.py"))["main"]()
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_every_row_has_its_recipe_and_every_suite_its_place_in_the_document(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page = (ROOT / "docs/accuracy.md").read_text()
    for suite in runpy.run_path(str(ROOT / "benchmarks/suites.py"))["SUITES"].values():
        for name in (suite.teacher, *(entry.config for entry in suite.entries.values())):
            assert (ROOT / f"configs/PhotoDigits/{name}.yaml").is_file(), name
        assert f"<!-- {suite.marker} short -->" in page and f"<!-- /{suite.marker} short -->" in page
