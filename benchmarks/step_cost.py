#!/usr/bin/env python
"""Cost of distillation: one distillation step over (plain student step + teacher forward to the deepest tap).

    python benchmarks/step_cost.py --pair quickstart --methods FeatureMimic MaskedGenerative
    python benchmarks/step_cost.py --pair r101-r50 --size 512 --batch 2
    python benchmarks/step_cost.py --pair x101-r50 --height 800 --width 1333 --methods ChannelMatching
    python benchmarks/step_cost.py --pair r101-r50 --opts DISTILL.TEACHER.FOLD_NORMS True
    python benchmarks/step_cost.py --methods auto --opts DISTILL.INIT_FROM_TEACHER.ENABLED True

With --opts the distillation step has these options; the teacher that its ratio is over has none.

All are timed in turn in one process, and each round begins with another, so the ratio holds when the machine's speed
drifts. The teacher runs to the method's deepest tap ("teacher_runs"): body only for ChannelMatching, with its head
for methods that compare predictions. Beside the bare step (forward, backward, optimizer) stands that of the trainer
(`TrainStep.run_step`), which also copies what a failed step must give back, checks and logs; its student is run the
same way. Weights are random, norms have statistics of the batch, and subnormal numbers are flushed, so that losses are
of order one and arithmetic takes the time that it takes in training.

Peak memory is that of a process of its own that runs nothing but one kind of step: the student's has no teacher. The
convolutions that MaskedGenerative trains to generate the teacher's maps are part of the method; they are timed on
their own too (forward and backward), and the ratio is given without them. ChannelMatching is timed between refreshes,
and in a tracking window too.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import peak_memory_mib, random_batch, settle_norms, timed
from torch import nn

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.distillers import ChannelMatching
from d2kd.engine import load_config
from d2kd.engine.host_memory import reuse_freed_memory
from d2kd.engine.optimizer import build_optimizer
from d2kd.engine.train_step import TrainStep
from d2kd.modeling import DistilledModel, FeatureTaps, build_distilled_model, load_teacher, teacher_config
from d2kd.token_learning import TokenLearner
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

PAIRS = {
    "quickstart": ("configs/PhotoDigits/retinanet_student.yaml", "configs/PhotoDigits/retinanet_teacher.yaml", 128, 8),
    "gfl": ("configs/PhotoDigits/gfl_student.yaml", "configs/PhotoDigits/gfl_teacher.yaml", 128, 8),
    "r50-r18": ("configs/COCO/retinanet_R18_1x.yaml", "configs/COCO/retinanet_R50_RGB_1x.yaml", 512, 2),
    "r101-r50": ("configs/COCO/retinanet_R50_1x.yaml", "configs/COCO/retinanet_R101.yaml", 512, 2),
    "x101-r50": ("configs/COCO/retinanet_R50_1x.yaml", "configs/COCO/retinanet_X101.yaml", 512, 2),
}
KINDS = ("student", "teacher", "distillation")
GENERATION = "generation"
TRACKING = "tracking"
TRAINER, STUDENT_TRAINER, TRACKING_TRAINER = "trainer", "student_trainer", "tracking_trainer"
#: What each loss must be below, and the task's losses together above: else the numbers are none of a training.
MOST, LEAST = 100.0, 0.01


def configuration(args: argparse.Namespace, method: str, weights: str) -> CfgNode:
    """Configuration of a distillation run between the pair's models, with random weights."""
    student, teacher, *_ = PAIRS[args.pair]
    options = [
        "MODEL.DEVICE",
        args.device,
        "MODEL.WEIGHTS",
        "",
        "DISTILL.METHODS",
        [method],
        "DISTILL.INIT_FROM_TEACHER.ENABLED",
        False,
    ]
    options += args.opts
    cfg = load_config(student, [*options, "DISTILL.TEACHER.CONFIG_FILE", teacher, "DISTILL.TEACHER.WEIGHTS", weights])
    if not Path(weights).exists():
        model = build_model(teacher_config(cfg))
        settle_norms(model, batch_of(args, cfg))
        torch.save({"model": model.state_dict()}, weights)
    if method == "ReceptiveTokens":
        cfg.DISTILL.RECEPTIVE_TOKENS.FILE = f"{weights}.tokens"
        cfg.DISTILL.RECEPTIVE_TOKENS.WARMUP_ITERS = 0  # with the student's masks, which cost more
        if not Path(cfg.DISTILL.RECEPTIVE_TOKENS.FILE).exists():
            learner = TokenLearner(load_teacher(teacher_config(cfg))[0])
            learner.export_tokens(dict.fromkeys(learner.taps, 0.0), 0).save(cfg.DISTILL.RECEPTIVE_TOKENS.FILE)
    return cfg


def batch_of(args: argparse.Namespace, cfg: CfgNode) -> list[dict[str, Any]]:
    """The images of every step."""
    torch.manual_seed(0)
    side = args.size or PAIRS[args.pair][2]
    size = (args.height or side, args.width or side)
    return random_batch(size, args.batch or PAIRS[args.pair][3], cfg.MODEL.RETINANET.NUM_CLASSES)


def still(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that leaves the weights as they are, so that nothing diverges."""
    optimizer = build_optimizer(cfg, model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: list[dict[str, Any]]) -> None:
    """A bare step."""
    optimizer.zero_grad()
    sum(model(batch).values()).backward()
    optimizer.step()


def steps(cfg: CfgNode, model: DistilledModel, batch: list[dict[str, Any]]) -> dict[str, Callable[[], None]]:
    """One call of each kind."""
    student = model.student
    if "DISTILL.INIT_FROM_TEACHER.FREEZE" in model.recipe:  # a plain student trains its head
        student = build_model(cfg).train()
        student.load_state_dict(model.student.state_dict())
    optimizers = {"student": still(cfg, student), "distillation": still(cfg, model)}
    trainers = {
        STUDENT_TRAINER: TrainStep(student, itertools.repeat(batch), optimizers["student"]),
        TRAINER: TrainStep(model, itertools.repeat(batch), optimizers["distillation"], detector=model.student),
    }
    compared = [pair.teacher.name for method in model.distillers.values() for pair in method.pairs]
    taps = FeatureTaps(model.teacher.model, compared)
    plain = model.teacher.in_float32()
    calls: dict[str, Callable[[], None]] = {
        "student": lambda: train(student, optimizers["student"], batch),
        "teacher": lambda: plain.record(batch, taps),
        "distillation": lambda: train(model, optimizers["distillation"], batch),
        **{kind: trainer.run_step for kind, trainer in trainers.items()},
    }
    if "MaskedGenerative" in model.distillers:
        calls[GENERATION] = generation(model, batch)
    if "ChannelMatching" in model.distillers:
        method = model.distillers["ChannelMatching"]
        calls.update(in_and_out_of_window(method, calls["distillation"], "distillation", TRACKING))
        calls.update(in_and_out_of_window(method, calls[TRAINER], TRAINER, TRACKING_TRAINER))
    return calls


def check_losses(model: DistilledModel, batch: list[dict[str, Any]]) -> dict[str, float]:
    """The losses of a step, which are of order one; of a method, their sum.

    Raises:
        AssertionError: they are not.
    """
    losses = {name: loss.item() for name, loss in model(batch).items()}
    task = sum(loss for name, loss in losses.items() if not name.startswith("distill/"))
    assert LEAST < task and all(math.isfinite(x) and x < MOST for x in losses.values()), losses
    return {"task": round(task, 3), "methods": round(sum(losses.values()) - task, 4)}


def teacher_extent(model: DistilledModel, call: Callable[[], None]) -> str:
    """How far the teacher runs: "body", "neck" or "head".

    Raises:
        AssertionError: further than ChannelMatching needs, or not as far as predictions.
    """
    ran: list[str] = []
    network = model.teacher.model
    convolutions = [(name, m) for name, m in network.named_modules() if isinstance(m, nn.Conv2d)]
    handles = [m.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, m in convolutions]
    call()
    for handle in handles:
        handle.remove()
    outside = [name for name in ran if not name.startswith("backbone.bottom_up.")]
    extent = "head" if any(not name.startswith("backbone.") for name in outside) else "neck" if outside else "body"
    for method in model.distillers.values():
        want = "body" if isinstance(method, ChannelMatching) else "head" if method.PREDICTION else extent
        assert extent == want, (extent, ran[-1])
    return extent


def in_and_out_of_window(
    method: ChannelMatching, step: Callable[[], None], outside: str, inside: str
) -> dict[str, Callable[[], None]]:
    """A step in the tracking window of the first refresh, and one after it."""

    def at(batch: int) -> None:
        method.batches = batch
        step()

    return {inside: partial(at, 1), outside: partial(at, method.schedule.batches_per_window)}


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


def prepare(
    args: argparse.Namespace, method: str, weights: str
) -> tuple[DistilledModel, CfgNode, list[dict[str, Any]]]:
    """Model, configuration and images of one method."""
    cfg = configuration(args, method, weights)
    batch = batch_of(args, cfg)
    model = build_distilled_model(cfg).train()
    settle_norms(model.student, batch)
    return model, cfg, batch


def measure(args: argparse.Namespace, method: str, weights: str) -> dict[str, Any]:
    """Medians in seconds, and the ratio of every round."""
    model, cfg, batch = prepare(args, method, weights)
    calls = steps(cfg, model, batch)
    clock = time.process_time if args.processor_time else time.perf_counter
    rounds: list[dict[str, float]] = []
    with EventStorage():
        losses, extent = check_losses(model, batch), teacher_extent(model, calls["teacher"])
        for number in range(args.repeats + 2):
            kinds = list(calls)
            first = number % len(kinds)
            rounds.append({k: timed(calls[k], args.device, clock) for k in kinds[first:] + kinds[:first]})
    rounds = rounds[2:]
    ratios = sorted(r["distillation"] / (r["student"] + r["teacher"]) for r in rounds)
    result: dict[str, Any] = {kind: round(statistics.median(r[kind] for r in rounds), 4) for kind in calls}
    result = {**result, "ratio": round(statistics.median(ratios), 3), "range": [round(ratios[i], 3) for i in (0, -1)]}
    if GENERATION in calls:
        without = [(r["distillation"] - r[GENERATION]) / (r["student"] + r["teacher"]) for r in rounds]
        result["ratio_without_generation"] = round(statistics.median(without), 3)
    if TRACKING in calls:
        result["ratio_while_tracking"] = ratio(rounds, TRACKING, "student")
        result["trainer_ratio_while_tracking"] = ratio(rounds, TRACKING_TRAINER, STUDENT_TRAINER)
    result["trainer_ratio"] = ratio(rounds, TRAINER, STUDENT_TRAINER)
    return {**result, "losses": losses, "teacher_runs": extent}


def ratio(rounds: list[dict[str, float]], kind: str, student: str) -> float:
    """Median over the rounds of a step over the student's and the teacher's forward."""
    return round(statistics.median(r[kind] / (r[student] + r["teacher"]) for r in rounds), 3)


def peak_memory(args: argparse.Namespace, method: str, weights: str, kind: str) -> float:
    """Peak memory in MiB of a process that runs three steps of one kind."""
    command = [sys.executable, __file__, "--memory-of", kind, "--methods", method, "--weights", weights]
    for name in ("pair", "device", "size", "height", "width", "batch"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--opts", *args.opts]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def report_memory(args: argparse.Namespace) -> None:
    """What the subprocess of `peak_memory` does; for the student it makes no teacher and no method."""
    if args.memory_of == "student":
        cfg = configuration(args, args.methods[0], args.weights)
        model, batch = build_model(cfg).train(), batch_of(args, cfg)
        settle_norms(model, batch)
        call: Callable[[], None] = partial(train, model, still(cfg, model), batch)
    else:
        whole, cfg, batch = prepare(args, args.methods[0], args.weights)
        call = steps(cfg, whole, batch)[args.memory_of]
    with EventStorage():
        for _ in range(3):
            call()
    sys.stdout.write(f"{peak_memory_mib(args.device):.0f}\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, and how: for this program and those that measure steps of the same pairs."""
    parser.add_argument("--pair", choices=PAIRS, default="quickstart")
    parser.add_argument("--methods", nargs="+", default=["FeatureMimic"])
    parser.add_argument("--size", type=int, default=0, help="image side in pixels; 0 takes the pair's")
    parser.add_argument("--height", type=int, default=0, help="of images in pixels; 0 takes --size")
    parser.add_argument("--width", type=int, default=0, help="of images in pixels; 0 takes --size")
    parser.add_argument("--batch", type=int, default=0, help="images a step; 0 takes the pair's")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processor-time", action="store_true", help="not the time that passes; for busy machines")
    parser.add_argument("--opts", nargs="*", default=[], help="of the distillation step, as KEY VALUE")


def main() -> None:
    """Measures and writes one JSON line a method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--memory-of", choices=(*KINDS, TRAINER), help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    if args.device == "cpu":
        reuse_freed_memory()
    if args.memory_of:
        report_memory(args)
        return
    with tempfile.TemporaryDirectory() as directory:
        weights = f"{directory}/teacher.pth"
        for method in args.methods:
            result = measure(args, method, weights)
            peaks = {kind: peak_memory(args, method, weights, kind) for kind in ("student", "distillation", TRAINER)}
            named = {
                "pair": args.pair,
                "method": method,
                "device": args.device,
                **({"opts": args.opts} if args.opts else {}),
            }
            line = {**named, **result, "peak_MiB": peaks}
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
