"""Step ratio and peak memory of every method at COCO's size, by benchmarks/step_cost.py."""

from functools import partial
from typing import Any

from .base import ROOT, Context, Stage

METHODS = ("FeatureMimic", "MaskedGenerative", "ReceptiveTokens", "ChannelMatching", "LogitKD", "HeadRegression")
#: Pairs of step_cost.py and images a step; 800 x 1333 pixels.
CASES = {"r101-r50": (2, 8, 16), "x101-r50": (2,)}
HEIGHT, WIDTH = 800, 1333
REPEATS = 5
PROGRAM = ROOT / "benchmarks" / "step_cost.py"


def run(context: Context, pair: str, batch: int) -> None:
    """Records each method."""
    source = PROGRAM.read_text(encoding="utf-8")
    if context.dry:
        if (pair, batch) != ("r101-r50", 2):
            context.record({"pair": pair, "batch": batch, "note": "in a dry run, as memory-r101-r50-2"})
            return
        pair = "quickstart"
    if f'"{pair}"' not in source:
        context.record({"pair": pair, "batch": batch, "note": "this step_cost.py has no such pair", "ok": False})
        return
    methods = METHODS[:1] if context.dry else METHODS
    for method in methods:
        row: dict[str, Any] = {"pair": pair, "batch": batch, "method": method}
        command: list[Any] = [PROGRAM, "--pair", pair, "--methods", method, "--device", context.device]
        command += ["--batch", "1" if context.dry else str(batch), "--repeats", "1" if context.dry else str(REPEATS)]
        if context.left < 15:
            context.record({**row, "ok": False, "note": "not run: out of time"})
            continue
        lines, problem = context.lines([*command, *size(source, context.dry)], method)
        for line in lines:
            context.record({**row, **measured(line)})
        if problem:
            context.record({**row, "ok": False, "note": problem})


def size(source: str, dry: bool) -> list[str]:
    """Arguments for the images: of COCO's proportion if the program has them, or as many pixels in a square."""
    if dry:
        return ["--size", "64"]
    if '"--height"' in source and '"--width"' in source:
        return ["--height", str(HEIGHT), "--width", str(WIDTH)]
    return ["--size", str(round((HEIGHT * WIDTH) ** 0.5))]


def measured(line: dict[str, Any]) -> dict[str, Any]:
    """What the table has of a line of step_cost.py."""
    peaks = line.get("peak_MiB", {})
    found = {f"{kind} s": line.get(kind) for kind in ("student", "teacher", "distillation")}
    found.update({"ratio": line.get("ratio"), "range": line.get("range")})
    return {**found, **{f"peak MiB, {kind}": peak for kind, peak in peaks.items()}}


COLUMNS = ("pair", "batch", "method", "student s", "teacher s", "distillation s", "ratio", "range")
STAGES = [
    Stage(
        f"memory-{pair}-{batch}",
        f"step ratio and peak memory of the methods, {pair}, {batch} images of {HEIGHT} x {WIDTH} pixels",
        partial(run, pair=pair, batch=batch),
        (*COLUMNS, "peak MiB, student", "peak MiB, distillation", "note"),
    )
    for pair, batches in CASES.items()
    for batch in batches
]
