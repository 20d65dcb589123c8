#!/usr/bin/env python
"""What d2kd adds to the step of a network of timm: classifiers against a plain loop, detectors against their parts.

    python benchmarks/timm_networks.py
    python benchmarks/timm_networks.py --classifiers resnet18 --detectors mobilenetv3_large_100 --repeats 15

A classifier's step is d2kd's own, with its check of the loss, its record and its rollback; the plain loop normalizes
the images, and makes forward pass, cross entropy, backward pass and step of SGD, no more. A detector is a RetinaNet;
its parts are timm's network by itself, and neck, head and loss on what that has given. All of it is repeated in turns,
in seconds of processor time, and the median of the ratios of each turn counts; above 1 the plain loop, or the sum of
the parts, is slower.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from common import random_batch
from torch import nn

from d2kd.config_reader import read_config
from d2kd.engine.train_step import TrainStep
from d2kd.modeling import build_network
from detectron2.utils.events import EventStorage

CLASSES = 100


def classifier_steps(network: str, side: int, count: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """d2kd's step and the plain one, of the same network on the same images."""
    options = ["MODEL.META_ARCHITECTURE", "ImageClassifier", "MODEL.DEVICE", "cpu", "MODEL.BACKBONE.FREEZE_AT", 0]
    options += ["MODEL.BACKBONE.NAME", "build_timm_network", "MODEL.TIMM.NAME", network]
    cfg = read_config("", [*options, "MODEL.CLASSIFIER.NUM_CLASSES", CLASSES, "INPUT.CLASSIFICATION.SIZE", side])
    model = build_network(cfg, network)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
    labels = torch.randint(CLASSES, (count,))
    batch = [{"image": image, "label": int(label)} for image, label in zip(images, labels)]
    step = TrainStep(model, iter(lambda: batch, None), _sgd(model))
    step.storage = None

    plain = timm.create_model(network, num_classes=CLASSES)
    optimizer = _sgd(plain)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))

    def ours() -> None:
        with EventStorage():
            step.run_step()

    def theirs() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(plain((images - mean) / std), labels)
        loss.backward()
        optimizer.step()
        loss.item()  # a loop that logs its loss waits for it too

    return ours, theirs


def detector_steps(network: str, side: int, count: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """The pass of a RetinaNet forward and backward, and that of its parts one after the other."""
    options: list[Any] = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", 0]
    options += ["MODEL.BACKBONE.NAME", "build_retinanet_timm_fpn_backbone", "MODEL.TIMM.NAME", network]
    cfg = read_config("configs/Base-RetinaNet.yaml", [*options, "MODEL.TIMM.OUT_FEATURES", ["res3", "res4", "res5"]])
    model = build_network(cfg, network)
    bottom_up = model.backbone.bottom_up
    net = timm.create_model(network, features_only=True, out_indices=(-3, -2, -1))
    batch = random_batch(side, count, classes=80)
    images = model.preprocess_image(batch).tensor
    maps = {name: x.detach() for name, x in bottom_up(images).items()}

    def whole() -> None:
        with EventStorage():
            sum(model(batch).values()).backward()

    def parts() -> None:
        features = net(images)
        torch.autograd.backward(features, [torch.ones_like(x) for x in features])
        given = _Given({name: x.requires_grad_() for name, x in maps.items()}, bottom_up)
        model.backbone.bottom_up = given
        try:
            whole()
        finally:
            model.backbone.bottom_up = bottom_up

    return whole, parts


class _Given(nn.Module):
    """A bottom-up network that gives the same maps whatever it is asked."""

    def __init__(self, maps: dict[str, torch.Tensor], instead_of: Any) -> None:
        super().__init__()
        self.maps = maps
        self.size_divisibility = instead_of.size_divisibility
        self.output_shape = instead_of.output_shape

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.maps


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)


def processor_time(call: Callable[[], None]) -> float:
    """Seconds of one call that the processor has worked for it, whatever else runs."""
    start = time.process_time()
    call()
    return time.process_time() - start


def compare(ours: Callable[[], None], theirs: Callable[[], None], repeats: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median over the turns of theirs over ours."""
    for call in (ours, theirs):
        call()
    turns = []
    for turn in range(repeats):
        first, second = (ours, theirs) if turn % 2 else (theirs, ours)
        times = {call: processor_time(call) for call in (first, second)}
        turns.append((times[ours], times[theirs]))
    mine, other = (statistics.median(times) for times in zip(*turns))
    return mine, other, statistics.median(b / a for a, b in turns)


def main() -> None:
    """Prints a table of both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifiers", nargs="*", default=["resnet18", "mobilenetv2_100", "convnext_atto"])
    parser.add_argument("--detectors", nargs="*", default=["mobilenetv3_large_100", "convnext_atto"])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print("| step of | images | d2kd (CPU s) | plain loop, or parts (s) | plain / d2kd |")
    print("| --- | --- | ---: | ---: | ---: |")
    for network in args.classifiers:
        mine, other, ratio = compare(*classifier_steps(network, 128, 16), args.repeats)
        print(f"| classifier {network} | 16 of 128 px | {mine:.3f} | {other:.3f} | {ratio:.3f} |", flush=True)
    for network in args.detectors:
        mine, other, ratio = compare(*detector_steps(network, 256, 2), args.repeats)
        print(f"| RetinaNet {network} | 2 of 256 px | {mine:.3f} | {other:.3f} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
