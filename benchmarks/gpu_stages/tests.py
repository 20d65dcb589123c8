"""The tests that need a GPU: those with the mark `cuda`. A dry run has them pretend that there is one."""

import xml.etree.ElementTree as ElementTree

from .base import ROOT, Context, Stage

#: What a dry run takes of them.
FEW = "generator or operator"


def run(context: Context) -> None:
    """Runs them in one process, and records each."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in path.read_text("utf-8")]
    context.folder.mkdir(parents=True, exist_ok=True)
    report = context.folder / "tests.xml"
    report.unlink(missing_ok=True)
    options = ["-q", "-p", "no:cacheprovider", "-m", "cuda", f"--junitxml={report}"]
    if context.dry:
        options += ["-k", FEW]
    environment = {"D2KD_PRETEND_CUDA": "1"} if context.dry else {}
    code, out = context.run(["-m", "pytest", *options, *files], "tests", environment=environment)
    (context.folder / "tests.log").write_text(out, encoding="utf-8")
    if not report.is_file():
        raise RuntimeError(f"pytest wrote no report ({context.failure(code, 'tests')}): {out[-2000:]}")
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        outcome, message = "passed", ""
        for kind in ("failure", "error", "skipped"):
            found = case.find(kind)
            if found is not None:
                outcome, message = kind, found.get("message", "")
        name = f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}"
        row = {"test": name, "outcome": outcome, "seconds": round(float(case.get("time", 0)), 2)}
        # where there is a GPU, none may be skipped
        context.record({**row, "message": message[:300], "ok": outcome == "passed"})


STAGE = Stage("tests", "the tests marked `cuda`", run, ("test", "outcome", "seconds", "message"))
