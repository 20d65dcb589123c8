"""The import finder: what d2lite leaves out is explained, under the name that was asked for."""

import subprocess
import sys

PROBE = """
import d2lite.alias
d2lite.alias.install("detectron2")
import detectron2.structures, d2lite.structures
assert detectron2.structures is d2lite.structures
for name in ("detectron2.modeling.nothing", "detectron2.nothing.at.all"):
    try:
        __import__(name)
    except ModuleNotFoundError as e:
        assert name.startswith(e.name) and e.name != "detectron2", e.name
        assert "D2KD_RUNTIME" in str(e), e
    else:
        raise AssertionError(name)
try:
    from detectron2.structures import RotatedBoxes
except ImportError as e:
    print(e)
"""


def test_missing_modules_keep_the_name_asked_for():
    run = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "RotatedBoxes" in run.stdout
