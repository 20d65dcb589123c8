"""Accuracy of the methods on PhotoDigits: benchmarks/accuracy.py, many runs side by side on one card."""

import json
from typing import Any

from .base import Context, Stage

#: Suites, in the order that they are begun in, and runs at a time.
SUITES = ("detection", "gfl", "masked-resnet", "classification", "segmentation", "solo", "reppoints")
JOBS, SEEDS = 10, (1, 2)


def run(context: Context) -> None:
    """Runs suites one after the other until the time is up; what is finished is not repeated by the next run."""
    context.prepare_data()
    for suite in SUITES[:1] if context.dry else SUITES:
        if context.left < 30:
            context.record({"suite": suite, "ok": True, "note": "not begun: out of time; run the stage again"})
            continue
        folder = context.folder / "runs"
        command: list[Any] = ["benchmarks/accuracy.py", "--suite", suite, "--output", folder, "--no-document"]
        command += ["--no-ablations", "--jobs", 1 if context.dry else JOBS, "--seeds"]
        changes = ["MODEL.DEVICE", context.device]
        if context.dry:
            command += [1, "--only", "baseline"]
            changes += ["SOLVER.MAX_ITER", 1, "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0]
        else:
            command += SEEDS
        # five seconds to write what is there
        code, out = context.run([*command, "--", *changes], suite, limit=context.left - 5)
        (context.folder / f"{suite}.log").write_text(out, encoding="utf-8")
        found = scores(context, suite)
        for row in found:
            context.record(row)
        if code == -1:
            context.record({"suite": suite, "note": "stopped at the end of the stage; run it again to go on"})
        elif code:
            context.record({"suite": suite, "ok": False, "note": context.failure(code, suite)})


def scores(context: Context, suite: str) -> list[dict[str, Any]]:
    """The metric on the test split of every finished run of a suite."""
    root = context.folder / "runs" / ("" if suite == "detection" else suite) / "short"
    found = []
    for path in sorted(root.rglob("evaluation/result.json")):
        metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        of_test = next(results for dataset, results in metrics.items() if dataset.endswith("_test"))
        task, values = next(iter(of_test.items()))
        name = next(iter(values))
        run_of = path.parent.parent.relative_to(root)
        found.append({"suite": suite, "run": str(run_of), "metric": f"{task}/{name}", "value": values[name]})
    return found


STAGE = Stage("accuracy", "methods on PhotoDigits side by side", run, ("suite", "run", "metric", "value", "note"))
