#!/usr/bin/env python
"""What the options of the teacher save: its forward pass as far as the pyramid, over that of the unchanged teacher.

    python benchmarks/faster_teacher.py [--config configs/COCO/retinanet_R101.yaml] [--size 512] [--device cuda]

All forms run in turn, on the CPU by the processor's clock. Weights are random, with settled norms. Compiling takes half
a minute, and needs a C++ compiler (CPU) or Triton (GPU); --no-compile leaves it out.
"""

import argparse
import statistics
import time
from functools import partial

import torch
from common import random_batch, settle_norms, timed

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.engine import load_config
from d2kd.modeling.teacher import Teacher
from d2kd.modeling.teacher_passes import Acceleration, DensePass
from detectron2.modeling import build_model

LEVELS = ["p3", "p4", "p5", "p6", "p7"]
BOTH = {"fold_norms": True, "channels_last": True}
#: Options, and the precision.
FORMS: dict[str, tuple[Acceleration, str]] = {
    "unchanged": (Acceleration(), "float32"),
    "folded norms": (Acceleration(fold_norms=True), "float32"),
    "channels last": (Acceleration(channels_last=True), "float32"),
    "both": (Acceleration(**BOTH), "float32"),
    "both, compiled": (Acceleration(**BOTH, compile="default"), "float32"),
    "bfloat16": (Acceleration(), "bfloat16"),
    "both, bfloat16": (Acceleration(**BOTH), "bfloat16"),
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/COCO/retinanet_R101.yaml")
    parser.add_argument("--size", type=int, default=512, help="image side in pixels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    cfg = load_config(args.config, ["MODEL.DEVICE", args.device, "MODEL.WEIGHTS", ""])
    model = build_model(cfg).eval()
    batch = random_batch(args.size, args.batch, 80)
    settle_norms(model, batch)
    forms = {n: form for n, form in FORMS.items() if not (args.no_compile and form[0].compile != "off")}
    runs = {n: DensePass(Teacher(model, precision=p), LEVELS, options) for n, (options, p) in forms.items()}
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    rounds = []
    for number in range(args.repeats + 2):
        names = list(runs)[number % len(runs) :] + list(runs)[: number % len(runs)]
        rounds.append({name: timed(partial(runs[name], batch), args.device, clock) for name in names})
    print("| form | seconds | over the unchanged |")
    print("| --- | ---: | ---: |")
    for name in runs:
        seconds = statistics.median(r[name] for r in rounds[2:])
        ratio = statistics.median(r[name] / r["unchanged"] for r in rounds[2:])
        print(f"| {name} | {seconds:.3f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
