#!/usr/bin/env python
"""Cost of channel matching: the assignment, one refresh against the published procedure, and a training step's share.

    python benchmarks/channel_matching.py --size 512

The networks are RetinaNet R50 -> R18 as published, with random weights. The published procedure (arXiv 2008.09958,
official code) tracks over 1,001 batches of 2 images on each of 8 GPUs before each of 6 refreshes in 90,000 iterations.
For every batch it runs each whole detector, post-processing included, and then each backbone again. Its cost is that
of one such batch, measured here, times 1,001; its assignment adds arcs in a Python loop.

Ours looks at 125 batches of 16 images (2 a process): with TRACKING "online" at training batches, whose features are
there anyway; with "pass", as the recipe has it, at batches that both networks run for.

Assignments are timed in seconds of the processor, all ways in turn, for all four levels of a pair together:

    python benchmarks/channel_matching.py --only-assignments

The distances are those between features of networks with random weights ("networks": all channels want the same few),
between features that share patterns ("correlated"), and random numbers. "ortools" is what a refresh does; "before" is
OR-Tools on the costs as they are, which a refresh did for equal channels until rows and columns were reduced first.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from common import random_batch, timed
from torch import Tensor

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.distillers import FeatureMaps
from d2kd.distillers.channel_matching.assignment import assign_channels, quantize, total_cost
from d2kd.distillers.channel_matching.similarity import channel_distances
from d2kd.engine import load_config
from d2kd.modeling import DistilledModel, build_distilled_model, teacher_config
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.events import EventStorage

#: Channels of res2 to res5 of a student and a teacher; X101 has those of R101.
CHANNELS = {
    "R101 -> R50": ((256, 512, 1024, 2048), (256, 512, 1024, 2048)),
    "R50 -> R18": ((64, 128, 256, 512), (256, 512, 1024, 2048)),
    "R50 -> MobileNetV1": ((128, 256, 512, 1024), (256, 512, 1024, 2048)),
}
BODIES = {
    "R18": ("configs/COCO/retinanet_R18_1x.yaml", []),
    "R50": ("configs/COCO/retinanet_R50_1x.yaml", []),
    "R101": ("configs/COCO/retinanet_R101.yaml", []),
    "X101": ("configs/COCO/retinanet_R101.yaml", ["MODEL.RESNETS.NUM_GROUPS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 8]),
}
RECIPE = "configs/COCO/retinanet_R18_R50_ChannelMatching_1x.yaml"
PUBLISHED_BATCHES, OUR_BATCHES, REFRESHES, ITERATIONS = 1001, 125, 6, 90000


def seconds(call: Callable[[], Any], device: str, repeats: int) -> float:
    """Median over `repeats` calls, after one that does not count."""
    return statistics.median([timed(call, device) for _ in range(repeats + 1)][1:])


def processor_seconds(call: Callable[[], Any], repeats: int = 1) -> float:
    """Median of processor time over `repeats` calls."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def correlated_costs(students: int, teachers: int) -> Tensor:
    """Mean channel distances of features that share 16 patterns, over 24 images of 7 x 7."""
    patterns = torch.randn(24, 16, 49)
    maps = [
        torch.einsum("nkp,ck->ncp", patterns, torch.randn(c, 16)) + torch.randn(24, c, 49) for c in (students, teachers)
    ]
    return channel_distances(maps[0][..., None], maps[1][..., None]) / 24


def replicated_loop(cost: Tensor, per_student: int) -> int:
    """The published way to the same optimum: k copies of every row, arcs added one by one. Returns the cost."""
    from ortools.graph.python import linear_sum_assignment

    rows = quantize(cost).repeat(per_student, 1).numpy()
    solver = linear_sum_assignment.SimpleLinearSumAssignment()
    for r in range(rows.shape[0]):
        for c in range(rows.shape[1]):
            solver.add_arc_with_cost(r, c, int(rows[r, c]))
    solver.solve()
    return solver.optimal_cost()


def unreduced(cost: Tensor) -> int:
    """Equal channels by OR-Tools, with what rows and columns have in common. Returns the cost."""
    from ortools.graph.python import linear_sum_assignment

    rows, number = quantize(cost), torch.arange(len(cost), dtype=torch.int32)
    solver = linear_sum_assignment.SimpleLinearSumAssignment()
    left, right = number.repeat(len(cost)), number.repeat_interleave(len(cost))
    solver.add_arcs_with_cost(left.numpy(), right.numpy(), (rows - rows.min()).t().flatten().numpy())
    assert solver.solve() == solver.OPTIMAL
    return int(solver.optimal_cost() + rows.min() * len(rows))


@torch.no_grad()
def features(body: str) -> dict[str, Tensor]:
    """Maps of a network with random weights, of four images of 256 x 256 of blurred noise."""
    path, options = BODIES[body]
    names = ["res2", "res3", "res4", "res5"]
    cfg = load_config(path, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.OUT_FEATURES", names, *options])
    torch.manual_seed(0)
    images = 60 * torch.nn.functional.interpolate(torch.randn(4, 3, 32, 32), scale_factor=8, mode="bilinear")
    return build_backbone(cfg).bottom_up.eval()(images)


def costs_of_pairs() -> Iterator[tuple[str, list[Tensor]]]:
    """Names, and the costs of the four levels: of networks as they start, and of each kind of made-up costs."""
    maps = {body: features(body) for body in BODIES}
    for student, teacher in (("R50", "R101"), ("R50", "X101"), ("R18", "R50")):
        ours, theirs = maps[student], maps[teacher]
        yield f"{teacher} -> {student}, networks", [channel_distances(ours[x], theirs[x]) / 4 for x in ours]
    for pair, channels in CHANNELS.items():
        yield f"{pair}, correlated", [correlated_costs(s, t) for s, t in zip(*channels)]
        yield f"{pair}, random", [4 * torch.rand(s, t) for s, t in zip(*channels)]


def measure_assignment(repeats: int, loop: bool) -> dict[str, Any]:
    """Median seconds for the four levels of a pair by each way, in turn; all must agree on the integer cost."""
    result: dict[str, Any] = {}
    for name, levels in costs_of_pairs():
        ways: dict[str, Callable[[Tensor], int]] = {
            solver: partial(_solved, solver=solver) for solver in ("ortools", "scipy")
        }
        if all(cost.shape[0] == cost.shape[1] for cost in levels):
            ways["before"] = unreduced
        rounds: list[dict[str, float]] = []
        for _ in range(repeats):
            totals: list[int] = []
            calls = {way: partial(_all_levels, solve, levels, totals) for way, solve in ways.items()}
            rounds.append({way: processor_seconds(call) for way, call in calls.items()})
            assert len(set(totals)) == 1, (name, totals)
        result[name] = {way: round(statistics.median(r[way] for r in rounds), 3) for way in ways}
    if loop:
        loop_costs = correlated_costs(512, 2048)
        result["512 -> 2048, correlated, published loop"] = processor_seconds(partial(replicated_loop, loop_costs, 4))
    return result


def _solved(cost: Tensor, solver: str) -> int:
    return total_cost(cost, assign_channels(cost, cost.shape[1] // cost.shape[0], solver=solver))


def _all_levels(solve: Callable[[Tensor], int], levels: list[Tensor], totals: list[int]) -> None:
    totals.append(sum(solve(cost) for cost in levels))


def build(device: str) -> DistilledModel:
    """The published pair with random weights."""
    with tempfile.TemporaryDirectory() as directory:
        weights = f"{directory}/teacher.pth"
        options = ["MODEL.DEVICE", device, "MODEL.WEIGHTS", "", "DISTILL.TEACHER.WEIGHTS", weights]
        cfg = load_config(RECIPE, options)
        torch.save({"model": build_model(teacher_config(cfg)).state_dict()}, weights)
        return build_distilled_model(cfg)


@torch.no_grad()
def published_tracking(model: DistilledModel, batch: list[dict[str, Any]]) -> None:
    """One batch of the published tracking: every detector whole, then its backbone once more, then the distances."""
    features = []
    for net in (model.student, model.teacher.model):
        net(batch)
        features.append(net.backbone.bottom_up(net.preprocess_image(batch).tensor))
    for name in features[0]:
        channel_distances(features[0][name], features[1][name])


def extract(model: DistilledModel, batch: list[dict[str, Any]]) -> tuple[FeatureMaps, FeatureMaps]:
    """What a tracking pass sees of a batch."""
    return next(iter(model.extract_features("ChannelMatching", [batch])))


def measure_refresh(model: DistilledModel, batch: list[dict[str, Any]], device: str, repeats: int) -> dict[str, Any]:
    """Seconds of a tracked batch (both ways), of an assignment of all levels, and of a whole refresh."""
    matching = model.distillers["ChannelMatching"]
    model.eval()
    published = seconds(lambda: published_tracking(model, batch), device, repeats)
    features = extract(model, batch)
    online = seconds(lambda: matching.track(*features), device, repeats)
    in_pass = seconds(lambda: matching.track(*extract(model, batch)), device, repeats)
    solved = seconds(matching.assign, device, repeats)
    refreshes = {"online": OUR_BATCHES * online + solved, "pass": OUR_BATCHES * in_pass + solved}
    reference = PUBLISHED_BATCHES * published
    return {
        "published_batch": published,
        "our_batch": {"online": online, "pass": in_pass},
        "assignment_of_all_levels": solved,
        "published_refresh_without_its_assignment": reference,
        "our_refresh": refreshes,
        "ratio": {tracking: refresh / reference for tracking, refresh in refreshes.items()},
    }


def measure_step(model: DistilledModel, batch: list[dict[str, Any]], device: str, repeats: int) -> dict[str, Any]:
    """Seconds of a training step's parts; the loss with its backward pass down to the taps."""
    matching = model.distillers["ChannelMatching"]
    model.train()
    student, teacher = extract(model, batch)
    student = {name: value.clone().requires_grad_() for name, value in student.items()}

    def loss() -> None:
        sum(super(type(matching), matching).forward(student, teacher).values()).backward()

    def student_step() -> None:
        sum(model.student(batch).values()).backward()

    @torch.no_grad()
    def teacher_body() -> None:
        net = model.teacher.model
        net.backbone.bottom_up(net.preprocess_image(batch).tensor)

    parts = {
        "loss": seconds(loss, device, repeats),
        "student": seconds(student_step, device, repeats),
        "teacher": seconds(teacher_body, device, repeats),
    }
    return {**parts, "step_ratio": sum(parts.values()) / (parts["student"] + parts["teacher"])}


def main() -> None:
    """Measures and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=800, help="image side in pixels")
    parser.add_argument("--batch", type=int, default=2, help="images a process and step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-loop", action="store_true", help="skip the published assignment in a Python loop")
    parser.add_argument("--only-assignments", action="store_true", help="no detectors and no steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    result = {"device": args.device, "threads": torch.get_num_threads(), "size": args.size, "batch": args.batch}
    result["assignment_s"] = measure_assignment(args.repeats, not args.no_loop)
    if args.only_assignments:
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
        return
    model, batch = build(args.device), random_batch(args.size, args.batch, 80)
    with EventStorage():
        result["refresh_s"] = refresh = measure_refresh(model, batch, args.device, args.repeats)
        result["step_s"] = step = measure_step(model, batch, args.device, args.repeats)
    run = ITERATIONS * (step["student"] + step["teacher"] + step["loss"])
    shares = {tracking: REFRESHES * cost / run for tracking, cost in refresh["our_refresh"].items()}
    result["refreshes_share_of_a_run"] = shares
    sys.stdout.write(json.dumps(result, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
