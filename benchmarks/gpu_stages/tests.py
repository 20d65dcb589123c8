"""The tests that need a GPU: those with the mark `cuda`. A dry run has them pretend that there is one."""

import importlib.util
import json

from .base import ROOT, Context, Stage

#: What a dry run takes of them.
FEW = "generator or operator"
#: Processes that share the card, where pytest-xdist is there.
PROCESSES = 4


def run(context: Context) -> None:
    """Runs them, and records each."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in path.read_text("utf-8")]
    context.folder.mkdir(parents=True, exist_ok=True)
    rows = context.folder / "tests.jsonl"
    rows.write_text("")
    environment = {"D2KD_TEST_ROWS": str(rows), "PYTHONPATH": f"{ROOT / 'benchmarks'}:{ROOT}"}
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", "gpu_stages.pytest_rows", "-m", "cuda"]
    if context.dry:
        options += ["-k", FEW]
        environment["D2KD_PRETEND_CUDA"] = "1"
    elif importlib.util.find_spec("xdist"):
        options += ["-n", str(PROCESSES)]
    code, out = context.run(["-m", "pytest", *options, *files], "tests", environment=environment)
    for row in map(json.loads, rows.read_text(encoding="utf-8").splitlines()):
        context.record({**row, "ok": row["outcome"] == "passed"})  # where there is a GPU, none may be skipped
    if code not in (0, 1):
        why = context.failure(code, "tests")
        context.record({"test": "pytest", "outcome": "error", "ok": False, "message": f"{why} {out[-300:]}"})


STAGE = Stage("tests", "the tests marked `cuda`", run, ("test", "outcome", "seconds", "message"))
