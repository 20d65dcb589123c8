"""Images per second of every architecture, by benchmarks/models.py: d2lite, and real Detectron2 where it imports."""

from typing import Any

from .base import Context, Stage

DRY_MODELS = "semantic_fpn_R18"


def run(context: Context) -> None:
    """Records each architecture with each runtime."""
    runtimes = ["d2lite"]
    code, _ = context.run(["-c", "import d2kd"], "detectron2", environment={"D2KD_RUNTIME": "detectron2"})
    runtimes += ["detectron2"] if code == 0 else []
    for runtime in runtimes:
        for model in models(context):
            row: dict[str, Any] = {"runtime": runtime, "model": model}
            if context.left < 15:
                context.record({**row, "ok": False, "note": "not run: out of time"})
                continue
            size = ["--size", 64, "--batch", 1, "--repeats", 1] if context.dry else ["--size", 800, "--batch", 4]
            command = ["benchmarks/models.py", "--only", model, "--in-this-process", "--device", context.device, *size]
            lines, problem = context.lines(command, model, environment={"D2KD_RUNTIME": runtime})
            for line in lines:
                context.record({**row, **line})
            if problem:
                context.record({**row, "ok": False, "note": problem})


def models(context: Context) -> list[str]:
    """The names of the architectures."""
    if context.dry:
        return [DRY_MODELS]
    code, out = context.run(["-c", "import sys; sys.path.append('benchmarks'); import models; print(*models.MODELS)"])
    if code:
        raise RuntimeError(f"models.py: {context.failure(code, 'program')}")
    return out.split()


COLUMNS = ("runtime", "model", "size", "batch", "train_images_per_s", "inference_images_per_s", "peak_MiB", "note")
STAGE = Stage("throughput", "training and inference of the architectures, images per second", run, COLUMNS)
