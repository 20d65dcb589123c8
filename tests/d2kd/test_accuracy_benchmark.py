"""benchmarks/accuracy.py: the commands of its suites, where their runs lie, and the tables it makes of them."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT


@pytest.fixture
def accuracy(monkeypatch, tmp_path):
    """The program, in a directory of its own, with runs that end at once; the lines that it has run."""
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
            score = 90.0 if output.name == "teacher" else 50.0 if "baseline" in str(output) else 70.0
            score += int(output.name.removeprefix("seed") or 0) if output.name.startswith("seed") else 0
            metrics = {"bbox": {"AP": score}, "classification": {"top1": score}}
            (output / "result.json").write_text(json.dumps({"metrics": metrics}))
            (output / "tokens.pth").touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", start)

    def run(*arguments):
        started.clear()
        monkeypatch.setattr(sys, "argv", ["accuracy.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            module["main"]()
        assert stop.value.code == 0, started
        return [line for line in started if "OUTPUT_DIR" in line]

    return run


#: What finished runs of the first suite have in their command.json; they are to be found again.
RECORDED = {
    "teacher": "tools/train_net.py --resume --config-file configs/PhotoDigits/retinanet_teacher.yaml SOLVER.MAX_ITER 1000 "
    "SOLVER.IMS_PER_BATCH 16 TEST.EVAL_PERIOD 0 OUTPUT_DIR output/accuracy/short/teacher",
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
    (student,) = accuracy("--suite", "mobilenet", "--seeds", 1, "--only", "baseline", without(ROOT, "mobilenet"))
    assert student[-2:] == ["OUTPUT_DIR", "output/accuracy/mobilenet/short/baseline/seed1"]
