"""tools/quickstart.py: how it runs its parts, with programs in place of the trainings."""

import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]

#: Counts iterations for a while; saves and stops at the first Ctrl-C.
SLOW = """
import json, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def stop(*_):
    (folder / "saved").write_text("")
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
for iteration in range(600):
    with open(folder / "metrics.json", "a") as file:
        file.write(json.dumps({"iteration": iteration, "total_loss": 0.5, "bbox/AP": "NaN"}) + "\\n")
    time.sleep(0.05)
"""
FAILS = 'import sys; print("what went wrong"); sys.exit(3)'
QUICK = 'import pathlib, sys; (pathlib.Path(sys.argv[1]) / "result.json").write_text("{}")'


@pytest.fixture
def quickstart() -> ModuleType:
    """The program as a module."""
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "tools/quickstart.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def perform(
    quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch, output: Path, programs: dict[str, str], period: float = 60
) -> None:
    """Performs runs of these names, of which each is a program with its folder as argument."""
    monkeypatch.setattr(quickstart, "command_of", lambda run, _: ["-c", programs[run.name], str(output / run.name)])
    monkeypatch.setattr(quickstart, "first_picture", lambda _: None)
    monkeypatch.setattr(quickstart.Progress, "PERIOD_S", period)
    runs = [quickstart.Run(name, name.title(), [], 600, 1.0) for name in programs]
    quickstart.perform(runs, output, dict(os.environ), quickstart.Progress(output, [runs]))


def test_a_part_that_fails_stops_the_other_one_which_saves(
    quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun = str(tmp_path / "one/metrics.json")
    waits = f"import pathlib, time\nwhile not pathlib.Path({begun!r}).exists(): time.sleep(.1)\n"
    with caplog.at_level(logging.INFO, "d2kd"), pytest.raises(SystemExit) as stopped:
        perform(quickstart, monkeypatch, tmp_path, {"one": SLOW, "two": waits + FAILS})
    assert stopped.value.code == 3
    assert (tmp_path / "one/saved").is_file()
    assert "what went wrong" in caplog.text
    assert f"Two stopped with status 3; run this again to continue. All it said: {tmp_path / 'two'}" in caplog.text


def test_what_is_finished_is_not_repeated_and_other_settings_begin_anew(
    quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    perform(quickstart, monkeypatch, tmp_path, {"one": QUICK, "two": QUICK})
    with caplog.at_level(logging.INFO, "d2kd"):
        perform(quickstart, monkeypatch, tmp_path, {"one": QUICK})
        assert "One: finished already" in caplog.text
        with pytest.raises(SystemExit):
            perform(quickstart, monkeypatch, tmp_path, {"one": FAILS})
    (kept,) = tmp_path.glob("one.old-*")
    assert (kept / "result.json").is_file()
    assert not (tmp_path / "one/result.json").exists()


def test_says_how_far_the_parts_are_and_what_is_left(
    quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ends = SLOW.replace("range(600)", "range(30)")
    with caplog.at_level(logging.INFO, "d2kd"):
        perform(quickstart, monkeypatch, tmp_path, {"one": ends}, period=0.2)
    lines = [record.message for record in caplog.records if "of 600 iterations, loss 0.50" in record.message]
    assert lines and all(re.search(r"; about \d+ min left for all$", line) for line in lines[1:])


def test_the_time_left_is_that_of_the_slowest_of_each_stage(quickstart: ModuleType, tmp_path: Path) -> None:
    stages = [
        [quickstart.Run("slow", "Slow", [], 100, 3.0), quickstart.Run("fast", "Fast", [], 100, 1.0)],
        [quickstart.Run("later", "Later", [], 50, 2.0)],
    ]
    progress = quickstart.Progress(tmp_path, stages)
    assert progress._left_s(stages[0]) is None
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow/metrics.json").write_text(json.dumps({"iteration": 50}) + '\n{"iter')
    progress.start = time.time() - 75.0  # 0.5 s for each unit of cost
    assert progress._left_s(stages[0]) == pytest.approx(0.5 * (150 + 100), rel=0.01)


def test_a_length_of_the_command_line_is_that_of_all_parts(quickstart: ModuleType, tmp_path: Path) -> None:
    stages = quickstart.stages(tmp_path, ["SOLVER.MAX_ITER", "12"])
    assert {run.iterations for stage in stages for run in stage} == {12}
    for run in (run for stage in stages for run in stage):
        assert run.arguments[-6:] == ["SOLVER.MAX_ITER", "12", "TEST.EVAL_PERIOD", "4", "SOLVER.MAX_ITER", "12"]


def test_it_runs_from_another_folder(tmp_path: Path) -> None:
    """Every program of the repository is found, and what goes wrong in a part is told without a traceback."""
    (tmp_path / "photo_digits").write_text("in the way")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DETECTRON2_DATASETS": str(tmp_path)}
    for arguments, message in (
        ([], "exists and is not a PhotoDigits dataset"),
        (["--output", "photo_digits/below"], "photo_digits/below cannot be written (Not a directory)"),
    ):
        command = [sys.executable, str(ROOT / "tools/quickstart.py"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        printed = done.stdout + done.stderr
        assert done.returncode == 2 and message in printed and "Traceback" not in printed, printed


def test_its_commands_name_programs_that_are_there(quickstart: ModuleType) -> None:
    run = quickstart.stages(Path("out"), [])[0][0]
    program = quickstart.command_of(run, Path("out"))[0]
    assert Path(program).resolve() == ROOT / "tools/train_net.py"
    if Path.cwd() == ROOT:  # as it has always been in fingerprints of finished runs
        assert program == "tools/train_net.py"
