#!/usr/bin/env python
"""How a method's loss grows with the size of the maps, their channels, and the number of levels.

    python benchmarks/growth.py [--methods FeatureMimic ReceptiveTokens] [--device cuda]

Forward and backward of the method alone, with equal channels on both sides and two images, in one thread on the CPU
(processor time). Each table changes one thing; the first row has ratio 1. Memory is the peak of what is allocated on
top of the maps and their gradients. A level is the map of 100 x 152 positions, so that levels differ in nothing else.
ChannelMatching is measured in and out of its tracking windows.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import timed, transient_mib

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.distillers import (
    ChannelMatching,
    Distiller,
    FeatureMimic,
    MaskedGenerative,
    NormAffine,
    ReceptiveTokens,
    TapInfo,
    TapPair,
)
from d2kd.distillers.receptive_tokens.tokens import Tokens

IMAGES, CHANNELS, HEIGHT, WIDTH, LEVELS = 2, 256, 100, 152, 1
#: What each table changes: channels, height, width, levels.
TABLES: dict[str, list[tuple[int, int, int, int]]] = {
    "positions": [
        (CHANNELS, HEIGHT // 2, WIDTH // 2, 1),
        (CHANNELS, HEIGHT, WIDTH, 1),
        (CHANNELS, 2 * HEIGHT, 2 * WIDTH, 1),
    ],
    "channels": [(128, HEIGHT, WIDTH, 1), (256, HEIGHT, WIDTH, 1), (512, HEIGHT, WIDTH, 1)],
    "levels": [(CHANNELS, HEIGHT, WIDTH, 1), (CHANNELS, HEIGHT, WIDTH, 2), (CHANNELS, HEIGHT, WIDTH, 4)],
}


def _pairs(channels: int, levels: int) -> list[TapPair]:
    norm = NormAffine(torch.ones(channels), torch.zeros(channels))
    names = [f"level{number}" for number in range(levels)]
    return [TapPair(*[TapInfo(name, channels, 8.0, norm=norm)] * 2) for name in names]


def _receptive_tokens(channels: int, levels: int) -> Distiller:
    tokens = [Tokens(torch.randn(6, channels) / channels**0.5) for _ in range(levels)]
    return ReceptiveTokens(pairs=_pairs(channels, levels), tokens=tokens, warmup_iters=0)


def _tracking(channels: int, levels: int) -> Distiller:
    method = ChannelMatching(pairs=_pairs(channels, levels))
    method.register_forward_pre_hook(lambda m, _: setattr(m, "batches", 1))
    return method


def _not_tracking(channels: int, levels: int) -> Distiller:
    method = ChannelMatching(pairs=_pairs(channels, levels))
    method.register_forward_pre_hook(lambda m, _: setattr(m, "batches", m.schedule.batches_per_window))
    return method


METHODS: dict[str, Callable[[int, int], Distiller]] = {
    "FeatureMimic": lambda channels, levels: FeatureMimic(pairs=_pairs(channels, levels)),
    "ReceptiveTokens": _receptive_tokens,
    "MaskedGenerative": lambda channels, levels: MaskedGenerative(pairs=_pairs(channels, levels)),
    "ChannelMatching": _not_tracking,
    "ChannelMatching, tracking": _tracking,
}


def measure(name: str, case: tuple[int, int, int, int], args: argparse.Namespace) -> tuple[float, float]:
    """Median seconds of a step, and transient MiB."""
    channels, height, width, levels = case
    torch.manual_seed(0)
    method = METHODS[name](channels, levels).to(args.device).train()
    shape = (IMAGES, channels, height, width)
    teacher = {pair.teacher.name: torch.randn(shape, device=args.device) for pair in method.pairs}
    student = {n: (x + torch.randn_like(x)).requires_grad_() for n, x in teacher.items()}

    def step() -> None:
        for x in student.values():
            x.grad = None
        method.zero_grad()
        sum(method(student, teacher).values()).backward()

    step()
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    seconds = statistics.median(timed(step, args.device, clock) for _ in range(args.repeats))
    gradients = sum(x.numel() * x.element_size() for x in student.values()) / 2**20
    return seconds, transient_mib(step, args.device) - gradients


def rows(name: str, args: argparse.Namespace) -> Iterator[list[Any]]:
    """Rows of a method."""
    for changed, cases in TABLES.items():
        first: tuple[float, float] | None = None
        for case in cases:
            seconds, memory = measure(name, case, args)
            first = first or (seconds, memory)
            channels, height, width, levels = case
            yield [
                name,
                changed,
                f"{levels} x {channels} x {height} x {width}",
                f"{1000 * seconds:.1f} ms",
                f"{seconds / first[0]:.1f}",
                f"{memory:.1f} MiB",
            ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    print("| method | grows | levels x C x H x W | a step | over the first | transient memory |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    for name in args.methods:
        for row in rows(name, args):
            print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
