"""What the name `detectron2` resolves to."""

import os
import subprocess
import sys

import pytest
from runs import ROOT


def resolve(choice, *paths):
    """The runtime that a new process finds, with Detectron2 installed where `paths` has it; else its last line."""
    program = f"import runpy; print(runpy.run_path({str(ROOT / 'd2kd/runtime.py')!r})['resolve_runtime']())"
    environment = {**os.environ, "D2KD_RUNTIME": choice, "PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT]))}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    return (run.stdout or run.stderr).splitlines()[-1]


@pytest.fixture
def installed(tmp_path):
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2/__init__.py").write_text("__version__ = '0.6'\n")
    return tmp_path


def test_detectron2_comes_first_where_it_is_installed(installed):
    assert resolve("auto", installed) == resolve("detectron2", installed) == "detectron2 0.6"
    assert resolve("d2lite", installed).startswith("d2lite ")


def test_other_values_are_named():
    line = resolve("detectron")
    assert "D2KD_RUNTIME is 'detectron'" in line and "auto, detectron2, d2lite" in line
