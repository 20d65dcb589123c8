#!/usr/bin/env python
"""Processor time of a ResNet-50's body by how its frozen batch norms are computed: each form in turn, in one process.

    python benchmarks/frozen_norm.py                  # forward without gradient, 800 x 1344 and 256 x 256
    python benchmarks/frozen_norm.py --gradient       # forward and backward

"inplace" is what d2lite does behind a convolution on the CPU, "product" what it does elsewhere, "batch_norm" PyTorch's
function in evaluation mode, "addcmul" one fused multiply-add; "none" leaves the norms out. One thread.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.engine import load_config
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone

IMAGES = {"800x1344": (1, 3, 800, 1344), "256x256": (2, 3, 256, 256)}
Form = Callable[[FrozenBatchNorm2d, Tensor, bool], Tensor]


def _factors(norm: FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale.view(1, -1, 1, 1), (norm.bias - norm.running_mean * scale).view(1, -1, 1, 1)


def _product(norm: FrozenBatchNorm2d, x: Tensor, inplace: bool = False) -> Tensor:
    scale, shift = _factors(norm)
    return (x * scale).add_(shift)


def _addcmul(norm: FrozenBatchNorm2d, x: Tensor, inplace: bool = False) -> Tensor:
    scale, shift = _factors(norm)
    return torch.addcmul(shift, x, scale)


def _batch_norm(norm: FrozenBatchNorm2d, x: Tensor, inplace: bool = False) -> Tensor:
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)


FORMS: dict[str, Form] = {
    "inplace": FrozenBatchNorm2d.forward,
    "product": _product,
    "batch_norm": _batch_norm,
    "addcmul": _addcmul,
    "none": lambda norm, x, inplace=False: x,
}


def measure(body: torch.nn.Module, images: Tensor, gradient: bool, repeats: int) -> dict[str, float]:
    """Median seconds by form, after a round that does not count; every other round takes the forms in reverse."""
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for number in range(repeats + 1):
        for form in list(FORMS)[:: 1 if number % 2 else -1]:
            FrozenBatchNorm2d.forward = FORMS[form]
            start = time.process_time()
            with torch.set_grad_enabled(gradient):
                maps = body(images)
                if gradient:
                    sum(x.mean() for x in maps.values()).backward()
            times[form].append(time.process_time() - start)
    FrozenBatchNorm2d.forward = FORMS["inplace"]
    return {form: round(statistics.median(found[1:]), 3) for form, found in times.items()}


def main() -> None:
    """Measures and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gradient", action="store_true", help="with the backward pass, and res2 not frozen")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--sizes", nargs="+", choices=IMAGES, default=list(IMAGES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", 0 if args.gradient else 2]
    body = build_backbone(load_config("configs/COCO/retinanet_R50_1x.yaml", options)).bottom_up
    for norm in body.modules():
        if isinstance(norm, FrozenBatchNorm2d):  # values that stay of order one through all blocks
            norm.weight.fill_(0.5)
            norm.running_mean.normal_()
    result = {size: measure(body, torch.randn(IMAGES[size]), args.gradient, args.repeats) for size in args.sizes}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
