"""Step ratio with the options that make a teacher faster, by benchmarks/step_cost.py."""

from typing import Any

from .base import Context, Stage
from .memory import COLUMNS, HEIGHT, PROGRAM, REPEATS, WIDTH, measured, size

METHOD, PAIR, BATCH = "FeatureMimic", "r101-r50", 2
LAYOUT = {"FOLD_NORMS": True, "CHANNELS_LAST": True}
#: Options below DISTILL.TEACHER by what the table calls them.
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "folded norms": {"FOLD_NORMS": True},
    "folded norms, channels last": LAYOUT,
    "the same in bfloat16": {**LAYOUT, "PRECISION": "bfloat16"},
    "the same in float16": {**LAYOUT, "PRECISION": "float16"},
    "compiled": {"FOLD_NORMS": True, "COMPILE": "default"},
    "compiled, CUDA graphs": {"FOLD_NORMS": True, "COMPILE": "cudagraphs"},
    "on a stream": {"FOLD_NORMS": True, "STREAM": True},
}


def run(context: Context) -> None:
    """Records each set of options."""
    source = PROGRAM.read_text(encoding="utf-8")
    chosen = ["folded norms, channels last"] if context.dry else list(OPTIONS)
    for name in chosen:
        row: dict[str, Any] = {"options": name, "pair": PAIR, "batch": BATCH, "method": METHOD}
        if context.left < 15:
            context.record({**row, "ok": False, "note": "not run: out of time"})
            continue
        command: list[Any] = [PROGRAM, "--pair", "quickstart" if context.dry else PAIR, "--methods", METHOD]
        command += ["--device", context.device, "--batch", 1 if context.dry else BATCH]
        command += ["--repeats", 1 if context.dry else REPEATS, *size(source, context.dry)]
        options = [x for key, value in OPTIONS[name].items() for x in (f"DISTILL.TEACHER.{key}", value)]
        lines, problem = context.lines([str(x) for x in [*command, *(["--opts", *options] if options else [])]], name)
        for line in lines:
            context.record({**row, **measured(line)})
        if problem:
            context.record({**row, "ok": False, "note": problem})


STAGE = Stage(
    "teacher",
    f"step ratio with the teacher's options, {METHOD}, {PAIR}, {BATCH} images of {HEIGHT} x {WIDTH} pixels",
    run,
    ("options", *COLUMNS, "peak MiB, student", "peak MiB, distillation", "note"),
)
