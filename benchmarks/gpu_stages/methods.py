"""One short training of every recipe for PhotoDigits, in float32, bfloat16 and float16."""

import json
import math
import re
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from .base import ROOT, Context, Stage

CONFIGS = Path("configs/PhotoDigits")
#: What a teacher cannot learn from here, as its own teacher is not trained.
ALONE = ["DISTILL.METHODS", "[]", "DISTILL.TEACHER.CONFIG_FILE", "", "DISTILL.TEACHER.WEIGHTS", ""]
#: Iterations of teachers and students, runs side by side, and the time that one run may take.
TEACHER_ITERATIONS, ITERATIONS, JOBS, RUN_LIMIT = 300, 160, 4, 120
DRY_RECIPES = ("retinanet_student_FeatureMimic",)
_TRAINING = Lock()


def recipes() -> list[Path]:
    """Students alone and distilled, by what they are."""
    return sorted(path for path in (ROOT / CONFIGS).glob("*_student*.yaml"))


def teacher_of(recipe: Path) -> str:
    """The configuration of a recipe's teacher; empty for a student alone."""
    found = re.search(r"TEACHER: *\{CONFIG_FILE: *(\w+)\.yaml", recipe.read_text(encoding="utf-8"))
    return found.group(1) if found else ""


def run(context: Context, precision: str) -> None:
    """Trains the teachers that are missing, then all recipes, several at a time on the card."""
    if context.dry and precision == "float16":
        context.record({"recipe": "all", "note": "float16 needs CUDA"})
        return
    context.prepare_data()
    wanted = [r for r in recipes() if not context.dry or r.stem in DRY_RECIPES]
    teachers = sorted({teacher_of(recipe) for recipe in wanted} - {""})
    context.side_by_side([partial(train_teacher, context, name) for name in teachers], JOBS)
    context.side_by_side([partial(train, context, recipe, precision) for recipe in wanted], 1 if context.dry else JOBS)


def options(context: Context, iterations: int) -> list[Any]:
    """What all runs have in common."""
    found: list[Any] = ["MODEL.DEVICE", context.device, "TEST.EVAL_PERIOD", 0, "SOLVER.CHECKPOINT_PERIOD", 10000]
    found += ["SOLVER.MAX_ITER", 2 if context.dry else iterations]
    return [*found, *(["SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0] if context.dry else [])]


def train_teacher(context: Context, name: str) -> None:
    """Trains a teacher, and learns its tokens where there is a recipe for them, unless an earlier stage has."""
    folder = context.output / "teachers" / name
    command: list[Any] = ["tools/train_net.py", "--config-file", CONFIGS / f"{name}.yaml"]
    steps = options(context, TEACHER_ITERATIONS)
    if not (folder / "model_final.pth").is_file():
        context.run([*command, *steps, *ALONE, "OUTPUT_DIR", folder], f"teacher_{name}", RUN_LIMIT)
    tokens = CONFIGS / f"{name}_tokens.yaml"
    target = context.output / "teachers" / f"{name}_tokens"
    if (ROOT / tokens).is_file() and not context.dry and not (target / "tokens.pth").is_file():
        weights = ["MODEL.WEIGHTS", folder / "model_final.pth", "MODEL.DEVICE", context.device]
        length = ["DISTILL.RECEPTIVE_TOKENS.LEARN.ITERATIONS", TEACHER_ITERATIONS]
        tool: list[Any] = ["tools/learn_tokens.py", "--config-file", tokens, *weights, *length, "OUTPUT_DIR", target]
        context.run(tool, f"tokens_{name}", RUN_LIMIT)


def train(context: Context, recipe: Path, precision: str) -> None:
    """Trains one student and records how it went."""
    row: dict[str, Any] = {"recipe": recipe.stem, "precision": precision}
    if context.left < 20:
        context.record({**row, "ok": False, "note": "not run: out of time"})
        return
    folder = context.folder / recipe.stem
    command: list[Any] = ["tools/train_net.py", "--config-file", recipe, "--overwrite"]
    changes = options(context, ITERATIONS)
    teacher = teacher_of(recipe)
    if teacher:
        command += ["--teacher-config", CONFIGS / f"{teacher}.yaml"]
        command += ["--teacher-weights", context.output / "teachers" / teacher / "model_final.pth"]
        changes += ["DISTILL.TEACHER.EVAL_FIRST", False]
    if "ReceptiveTokens" in recipe.read_text(encoding="utf-8"):
        changes += ["DISTILL.RECEPTIVE_TOKENS.FILE", context.output / "teachers" / f"{teacher}_tokens" / "tokens.pth"]
    if precision != "float32":
        changes += ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", precision]
    code, out = context.run([*command, *changes, "OUTPUT_DIR", folder], recipe.stem, RUN_LIMIT)
    (context.folder / f"{recipe.stem}.log").write_text(out, encoding="utf-8")
    if code:
        context.record({**row, "ok": False, "note": context.failure(code, recipe.stem) + out[-300:]})
        return
    row.update(outcome(folder))
    # two iterations teach nothing
    row["ok"] = row["finite"] and (context.dry or row["loss falls"])
    context.record(row)


def outcome(folder: Path) -> dict[str, Any]:
    """Losses, speed, memory and metric of a finished run."""
    text = (folder / "metrics.json").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    logged = [line for line in lines if "total_loss" in line]
    # the student's own: those of a method may grow, where its weight does
    losses = [sum(value for name, value in line.items() if name.startswith("loss")) for line in logged]
    times = [line["time"] for line in lines if "time" in line]
    memory = re.findall(r"max_mem: (\d+)M", (folder / "log.txt").read_text(encoding="utf-8"))
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    metrics = {f"{task}/{name}": x for task, values in result["metrics"].items() for name, x in values.items()}
    name = next((name for name, value in metrics.items() if value is not None), next(iter(metrics)))
    scales = [line["grad_scale"] for line in lines if "grad_scale" in line]
    return {
        "first loss": round(losses[0], 4),
        "last loss": round(losses[-1], 4),
        "loss falls": losses[-1] < losses[0],
        "finite": all(math.isfinite(float(line["total_loss"])) for line in logged),
        "metric": name,
        "value": metrics[name],
        "iterations/s": round(1 / times[-1], 2) if times else None,
        "peak MiB": int(memory[-1]) if memory else None,
        "loss scale": scales[-1] if scales else None,
    }


COLUMNS = ("recipe", "first loss", "last loss", "loss falls", "finite", "metric", "value", "iterations/s", "peak MiB")
STAGES = [
    Stage(
        f"methods-{precision}",
        f"a short training of every PhotoDigits recipe in {precision}, {JOBS} at a time",
        partial(run, precision=precision),
        (*COLUMNS, "note"),
    )
    for precision in ("float32", "bfloat16", "float16")
]
