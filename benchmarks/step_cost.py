#!/usr/bin/env python
"""Cost of distillation: one distillation step over (plain student step + teacher forward to the deepest tap).

    python benchmarks/step_cost.py --pair quickstart --methods FeatureMimic MaskedGenerative
    python benchmarks/step_cost.py --pair r101-r50 --size 512 --batch 2

All three are timed in turn in one process, so the ratio holds when the machine's speed drifts. Weights are random. Peak
memory is that of a process of its own that runs nothing but one kind of step. The convolutions that MaskedGenerative
trains to generate the teacher's maps are part of the method; they are timed on their own too (forward and backward),
and the ratio is given without them. ChannelMatching is timed between refreshes, and in a tracking window too.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import peak_memory_mib, random_batch, timed

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.distillers import ChannelMatching
from d2kd.engine import load_config
from d2kd.engine.optimizer import build_optimizer
from d2kd.modeling import DistilledModel, FeatureTaps, build_distilled_model, load_teacher, teacher_config
from d2kd.token_learning import TokenLearner
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

PAIRS = {
    "quickstart": ("configs/PhotoDigits/retinanet_student.yaml", "configs/PhotoDigits/retinanet_teacher.yaml", 128, 8),
    "r50-r18": ("configs/COCO/retinanet_R18_1x.yaml", "configs/COCO/retinanet_R50_RGB_1x.yaml", 512, 2),
    "r101-r50": ("configs/COCO/retinanet_R50_1x.yaml", "configs/COCO/retinanet_R101.yaml", 512, 2),
}
KINDS = ("student", "teacher", "distillation")
GENERATION = "generation"
TRACKING = "tracking"


def configuration(pair: str, method: str, device: str, weights: str) -> CfgNode:
    """Configuration of a distillation run between the pair's models, with random weights."""
    student, teacher, *_ = PAIRS[pair]
    options = [
        "MODEL.DEVICE",
        device,
        "MODEL.WEIGHTS",
        "",
        "DISTILL.METHODS",
        [method],
        "DISTILL.INIT_FROM_TEACHER.ENABLED",
        False,
    ]
    cfg = load_config(student, [*options, "DISTILL.TEACHER.CONFIG_FILE", teacher, "DISTILL.TEACHER.WEIGHTS", weights])
    if not Path(weights).exists():
        torch.save({"model": build_model(teacher_config(cfg)).state_dict()}, weights)
    if method == "ReceptiveTokens":
        cfg.DISTILL.RECEPTIVE_TOKENS.FILE = f"{weights}.tokens"
        cfg.DISTILL.RECEPTIVE_TOKENS.WARMUP_ITERS = 0  # with the student's masks, which cost more
        learner = TokenLearner(load_teacher(teacher_config(cfg))[0])
        learner.export_tokens(dict.fromkeys(learner.taps, 0.0), 0).save(cfg.DISTILL.RECEPTIVE_TOKENS.FILE)
    return cfg


def steps(cfg: CfgNode, model: DistilledModel, batch: list[dict[str, Any]]) -> dict[str, Callable[[], None]]:
    """One call of each kind."""
    optimizers = {"student": build_optimizer(cfg, model.student), "distillation": build_optimizer(cfg, model)}
    for optimizer in optimizers.values():  # the weights stay, so that nothing diverges
        for group in optimizer.param_groups:
            group["lr"] = 0.0

    def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        sum(net(batch).values()).backward()
        optimizer.step()

    compared = [pair.teacher.name for method in model.distillers.values() for pair in method.pairs]
    taps = FeatureTaps(model.teacher.model, compared)
    calls = {
        "student": lambda: train(model.student, optimizers["student"]),
        "teacher": lambda: model.teacher.record(batch, taps),
        "distillation": lambda: train(model, optimizers["distillation"]),
    }
    if "MaskedGenerative" in model.distillers:
        calls[GENERATION] = generation(model, batch)
    if "ChannelMatching" in model.distillers:
        calls.update(in_and_out_of_window(model.distillers["ChannelMatching"], calls["distillation"]))
    return calls


def in_and_out_of_window(method: ChannelMatching, step: Callable[[], None]) -> dict[str, Callable[[], None]]:
    """A step in the tracking window of the first refresh, and one after it."""

    def at(batch: int) -> None:
        method.batches = batch
        step()

    return {TRACKING: partial(at, 1), "distillation": partial(at, method.schedule.batches_per_window)}


def generation(model: DistilledModel, batch: list[dict[str, Any]]) -> Callable[[], None]:
    """Forward and backward of MaskedGenerative's generation blocks alone, on maps as large as those they see."""
    method = model.distillers["MaskedGenerative"]
    inputs: list[torch.Tensor] = []

    def call() -> None:
        if not inputs:  # in a round that does not count, and not at all where another kind's memory is measured
            _, maps = next(iter(model.extract_features("MaskedGenerative", [batch])))
            inputs.extend(torch.randn_like(maps[pair.teacher.name]).requires_grad_() for pair in method.pairs)
        method.zero_grad()
        for block, x in zip(method.generation, inputs):
            y = block(x)
            y.backward(torch.ones_like(y))

    return call


def prepare(args: argparse.Namespace, method: str, weights: str) -> dict[str, Callable[[], None]]:
    """The calls of one method."""
    torch.manual_seed(0)
    cfg = configuration(args.pair, method, args.device, weights)
    model = build_distilled_model(cfg).train()
    size, count = args.size or PAIRS[args.pair][2], args.batch or PAIRS[args.pair][3]
    return steps(cfg, model, random_batch(size, count, cfg.MODEL.RETINANET.NUM_CLASSES))


def measure(args: argparse.Namespace, method: str, weights: str) -> dict[str, Any]:
    """Medians in seconds, and the ratio of every round."""
    calls = prepare(args, method, weights)
    rounds: list[dict[str, float]] = []
    with EventStorage():
        for _ in range(args.repeats + 2):
            rounds.append({kind: timed(call, args.device) for kind, call in calls.items()})
    rounds = rounds[2:]
    ratios = sorted(r["distillation"] / (r["student"] + r["teacher"]) for r in rounds)
    result = {kind: round(statistics.median(r[kind] for r in rounds), 4) for kind in calls}
    result = {**result, "ratio": round(statistics.median(ratios), 3), "range": [round(ratios[i], 3) for i in (0, -1)]}
    if GENERATION in calls:
        without = [(r["distillation"] - r[GENERATION]) / (r["student"] + r["teacher"]) for r in rounds]
        result["ratio_without_generation"] = round(statistics.median(without), 3)
    if TRACKING in calls:
        tracking = [r[TRACKING] / (r["student"] + r["teacher"]) for r in rounds]
        result["ratio_while_tracking"] = round(statistics.median(tracking), 3)
    return result


def peak_memory(args: argparse.Namespace, method: str, weights: str, kind: str) -> float:
    """Peak memory in MiB of a process that runs three steps of one kind."""
    command = [
        sys.executable,
        __file__,
        "--pair",
        args.pair,
        "--device",
        args.device,
        "--memory-of",
        kind,
        "--methods",
        method,
    ]
    command += ["--weights", weights, "--size", str(args.size), "--batch", str(args.batch)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def report_memory(args: argparse.Namespace) -> None:
    """What the subprocess of `peak_memory` does."""
    call = prepare(args, args.methods[0], args.weights)[args.memory_of]
    with EventStorage():
        for _ in range(3):
            call()
    sys.stdout.write(f"{peak_memory_mib(args.device):.0f}\n")


def main() -> None:
    """Measures and writes one JSON line a method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, default="quickstart")
    parser.add_argument("--methods", nargs="+", default=["FeatureMimic"])
    parser.add_argument("--size", type=int, default=0, help="image side in pixels; 0 takes the pair's")
    parser.add_argument("--batch", type=int, default=0, help="images a step; 0 takes the pair's")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory-of", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        report_memory(args)
        return
    with tempfile.TemporaryDirectory() as directory:
        weights = f"{directory}/teacher.pth"
        for method in args.methods:
            result = measure(args, method, weights)
            peaks = {kind: peak_memory(args, method, weights, kind) for kind in ("student", "distillation")}
            line = {"pair": args.pair, "method": method, "device": args.device, **result, "peak_MiB": peaks}
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
