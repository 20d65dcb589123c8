#!/usr/bin/env python
"""What a warm cache of the teacher's features leaves of distillation's cost, and what an image takes on the disk.

    python benchmarks/cache.py --pair quickstart
    python benchmarks/cache.py --pair r101-r50 --size 512 --batch 2 --methods FeatureMimic
    python benchmarks/cache.py --sizes

Steps of the trainer (`TrainStep.run_step`) are timed in turn in one process, as in step_cost.py: of the student alone,
of distillation with the teacher, and of distillation from a warm cache. The last one twice: with entries that the
loader's processes have read ("cached"), and reading them itself in the step ("cached_reading"), as with
DATALOADER.NUM_WORKERS 0. A step from the cache is the student's, the method's own arithmetic ("method": its step with
features at hand, less the student's) and the unpacking of features ("unpacking").

`--sizes` makes no measurement but of files: the bytes of an image by pair and form, as docs/cache.md has them.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from typing import Any

import torch
from common import settle_norms, timed
from step_cost import add_arguments, batch_of, configuration, still

from d2kd.engine.train_step import TrainStep
from d2kd.modeling import build_distilled_model
from d2kd.modeling.feature_cache import DTYPES, FOUND, encode
from d2kd.modeling.teacher_passes import CachedDensePass, DensePass, TeacherFeatures
from detectron2.utils.events import EventStorage


class _AtHand(DensePass):
    """Gives features that were computed once: what is left is the method."""

    features: TeacherFeatures

    def __call__(self, *_: Any) -> TeacherFeatures:
        return self.features


def measure(args: argparse.Namespace, method: str, folder: str) -> dict[str, Any]:
    """Medians in seconds of the steps, and their ratios to the student's."""
    cfg = configuration(args, method, f"{folder}/teacher.pth")
    cfg.DISTILL.CACHE.DIR, cfg.DISTILL.CACHE.DTYPE = f"{folder}/cache", args.dtype
    batch = batch_of(args, cfg)
    model = build_distilled_model(cfg).train()
    settle_norms(model.student, batch)
    cached = model.passes.dense
    assert isinstance(cached, CachedDensePass)
    plain, at_hand = cached.uncached(), _AtHand(model.teacher, cached.taps)
    on_device = [{**x, "image": x["image"].to(model.device)} for x in batch]
    at_hand.features = cached(on_device)
    cached.cache.flush()
    found = [{**x, FOUND: of_image} for x, of_image in zip(batch, cached.cache.find(batch))]
    optimizers = {"student": still(cfg, model.student), "distillation": still(cfg, model)}
    student = TrainStep(model.student, itertools.repeat(batch), optimizers["student"])

    def step(dense: DensePass, images: list[dict[str, Any]]) -> Any:
        trainer = TrainStep(model, itertools.repeat(images), optimizers["distillation"], detector=model.student)

        def call() -> None:
            model.passes.dense = dense
            trainer.run_step()

        return call

    found_on_device = [{**x, "image": y["image"]} for x, y in zip(found, on_device)]
    calls = {
        "student": student.run_step,
        "distillation": step(plain, batch),
        "cached": step(cached, found),
        "cached_reading": step(cached, batch),
        "at_hand": step(at_hand, batch),
        "unpacking": partial(cached, found_on_device),
    }
    clock = time.process_time if args.processor_time else time.perf_counter
    rounds: list[dict[str, float]] = []
    with EventStorage():
        for number in range(args.repeats + 2):
            kinds = list(calls)
            first = number % len(kinds)
            rounds.append({k: timed(calls[k], args.device, clock) for k in kinds[first:] + kinds[:first]})
    rounds = rounds[2:]
    assert cached.cache.misses == len(batch), "the cache was not warm"
    seconds = {kind: round(statistics.median(r[kind] for r in rounds), 4) for kind in calls}
    ratios = {
        f"{kind}_over_student": round(statistics.median(r[kind] / r["student"] for r in rounds), 3)
        for kind in ("distillation", "cached", "cached_reading", "at_hand")
    }
    added = [(r["cached"] - r["at_hand"]) / r["student"] for r in rounds]
    sizes = [entry.size for entry in cached.cache.store.entries()]
    return {
        "seconds": seconds,
        **ratios,
        "cache_adds_of_student": round(statistics.median(added), 3),
        "MB_an_image": round(statistics.mean(sizes) / 1e6, 3),
    }


def entry_sizes() -> list[dict[str, Any]]:
    """Bytes of an image with the levels p3 to p7 of a RetinaNet, from files of random numbers."""
    rows = []
    for height, width, channels in ((128, 128, 256), (512, 512, 256), (800, 1088, 256), (800, 1344, 256)):
        maps = {
            f"p{level}": torch.randn(1, channels, -(-height // 2**level), -(-width // 2**level))
            for level in range(3, 8)
        }
        numbers = sum(x.numel() for x in maps.values())
        row: dict[str, Any] = {"image": f"{height}x{width}", "channels": channels, "numbers": numbers}
        rows.append({**row, **{f"{dtype}_MB": round(len(encode(maps, dtype, "k")) / 1e6, 3) for dtype in DTYPES}})
    return rows


def main() -> None:
    """Measures and writes one JSON line a method, or a size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="how features are kept")
    parser.add_argument("--sizes", action="store_true", help="write sizes of files, and measure nothing")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    if args.sizes:
        for row in entry_sizes():
            sys.stdout.write(json.dumps(row) + "\n")
        return
    for method in args.methods:
        with tempfile.TemporaryDirectory() as folder:
            line = {"pair": args.pair, "method": method, "device": args.device, "dtype": args.dtype}
            sys.stdout.write(json.dumps({**line, **measure(args, method, folder)}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
