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
for module, name in (
    ("structures", "RotatedBoxes"),
    ("data.transforms", "MinIoURandomCrop"),
    ("data.datasets", "register_lvis_instances"),
    ("layers", "ASPP"),
    ("evaluation", "CityscapesSemSegEvaluator"),
):
    try:
        exec(f"from detectron2.{module} import {name}")
    except ImportError as e:
        print(e)
"""


def test_missing_modules_keep_the_name_asked_for():
    run = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 5 and all("d2lite does not have it; Detectron2 does" in line for line in lines)
    assert lines[0].startswith("RotatedBoxes (rotated boxes) is not in d2lite.structures")
