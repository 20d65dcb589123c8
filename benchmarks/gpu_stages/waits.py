"""Where the host waits for the GPU in a training step, by method: `torch.cuda.set_sync_debug_mode`.

    python benchmarks/gpu_stages/waits.py retinanet_student_FeatureMimic --device cuda

A dry run counts with tensors that pretend to be on a GPU (benchmarks/pretend_cuda.py), which sees the same operators.
"""

import argparse
import collections
import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from gpu_stages.base import ROOT, Context, Stage
from gpu_stages.methods import CONFIGS, recipes, teacher_of

DRY_RECIPES = ("retinanet_student_FeatureMimic",)
#: Steps before the one that counts: the first ones find sizes and fill caches.
WARM_UP = 2


def run(context: Context) -> None:
    """Records each recipe in a process of its own."""
    for recipe in (r for r in recipes() if not context.dry or r.stem in DRY_RECIPES):
        if context.left < 15:
            context.record({"recipe": recipe.stem, "ok": False, "note": "not run: out of time"})
            continue
        command = ["benchmarks/gpu_stages/waits.py", recipe.stem, "--device", "pretend" if context.dry else "cuda"]
        lines, problem = context.lines(command, recipe.stem)
        for line in lines:
            context.record({**line, "list": ", ".join(f"{n} x {place}" for place, n in line["places"].items())})
        if problem:
            context.record({"recipe": recipe.stem, "ok": False, "note": problem})


STAGE = Stage(
    "waits", "host waits in a training step", run, ("recipe", "waits", "in the student alone", "list", "note")
)


def main() -> None:
    """Counts the waits of one step of a recipe, and of its student alone; one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="name of a file in configs/PhotoDigits")
    parser.add_argument("--device", choices=("cuda", "pretend"), default="cuda")
    args = parser.parse_args()
    recipe = ROOT / CONFIGS / f"{args.recipe}.yaml"
    count = counted if args.device == "cuda" else pretended
    with tempfile.TemporaryDirectory() as folder:
        places = count(recipe, Path(folder))
        alone = recipe.with_name(f"{recipe.stem.split('_student')[0]}_student.yaml")
        base = sum(count(alone, Path(folder)).values()) if teacher_of(recipe) else None
    row = {"recipe": recipe.stem, "waits": sum(places.values()), "in the student alone": base, "places": places}
    sys.stdout.write(json.dumps(row) + "\n")


def counted(recipe: Path, folder: Path) -> dict[str, int]:
    """By the warnings of CUDA's debug mode."""
    import torch

    step = prepared(recipe, folder)
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    found: collections.Counter[str] = collections.Counter()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            found[here()] += 1

    with warnings.catch_warnings():  # which restores `showwarning`
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return dict(found.most_common())


def pretended(recipe: Path, folder: Path) -> dict[str, int]:
    """By tensors that pretend."""
    from pretend_cuda import PretendCuda

    with PretendCuda() as gpu:
        step = prepared(recipe, folder)
        for _ in range(WARM_UP):
            step()
        gpu.waits.clear()
        step()
        found = dict(gpu.waits.most_common())
    return {f"{place} {operator}": n for (place, operator), n in found.items()}


def here() -> str:
    """file:line of the innermost frame of d2kd or d2lite."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("d2kd", "d2lite"):
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "elsewhere"


def prepared(recipe: Path, folder: Path) -> Callable[[], Any]:
    """A training step of a recipe with random weights on one random batch, on the device `cuda`."""
    from recipe_steps import recipe_step

    return recipe_step(recipe, folder, "cuda")


if __name__ == "__main__":
    main()
