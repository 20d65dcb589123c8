#!/usr/bin/env python
"""Inference of SOLO with 100 instances an image, over RetinaNet's with as many boxes, at equal backbone and size.

    python benchmarks/solo.py                                # 512 x 512 pixels, one image
    python benchmarks/solo.py --height 800 --width 1344
    python benchmarks/solo.py --head decoupled --device cuda --batch 8

Weights and images are random. Thresholds are set so that as many candidates as NMS takes are left (500 masks, 1,000
boxes), and the biases of the masks so that each covers about half of the image: more than trained networks have. The
models are timed in turn in one process, so the ratio holds when the machine's speed drifts; on the CPU it is processor
time, in one thread.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import timed

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.engine import load_config
from d2kd.modeling.meta_arch.solo import SOLO
from d2kd.modeling.meta_arch.solo.decoding import point_nms
from detectron2.modeling import build_model


@torch.no_grad()
def build(path: str, options: list[Any], args: argparse.Namespace, inputs: list[dict[str, Any]]) -> Any:
    """A random model that finds `args.instances` in every image."""
    options = [*options, "MODEL.WEIGHTS", "", "MODEL.DEVICE", args.device]
    cfg = load_config(path, [*options, "TEST.DETECTIONS_PER_IMAGE", args.instances])
    model = build_model(cfg).to(args.device).eval()
    features = model.backbone(model.preprocess_image(inputs).tensor)
    features = [features[name] for name in model.head_in_features]
    spread = torch.cat([x.flatten() for x in model.head(features)[0]]).std()
    model.head.cls_score.weight.div_(spread)  # neither all the same nor saturated
    logits = model.head(features)[0]
    if isinstance(model, SOLO):
        for name, parameter in model.head.named_parameters():
            if name.startswith("mask_pred") and name.endswith("bias"):
                parameter.fill_(0.0 if "x" not in name and "y" not in name else 1.0)
        scores = [point_nms(x.sigmoid()).flatten(1) for x in logits]
        least = torch.cat(scores, dim=1).topk(model.thresholds.candidates)[0][:, -1].min().item()
        model.thresholds = dataclasses.replace(model.thresholds, score=least, final_score=0.0)
    else:
        model.head.bbox_pred.weight.zero_()  # boxes are anchors, and none is empty
        scores = [x.sigmoid().flatten(1) for x in logits]
        model.test_score_thresh = torch.cat(scores, dim=1).topk(1000)[0][:, -1].min().item()
    counts = {len(output["instances"]) for output in model(inputs)}
    if counts != {args.instances}:
        raise RuntimeError(f"{path} finds {counts} instances in these images, not {args.instances}")
    return model


def seconds_of(call: Callable[[], Any], device: str) -> float:
    """Seconds of one call: on the CPU those of the processor, which others may use too."""
    if device != "cpu":
        return timed(call, device)
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    """One JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=512, help="of the images, in pixels")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--instances", type=int, default=100)
    parser.add_argument("--head", choices=("plain", "decoupled"), default="plain")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.device == "cpu":
        torch.set_num_threads(1)
    size = (args.height, args.width)
    inputs = [{"image": torch.randint(0, 256, (3, *size), dtype=torch.uint8)} for _ in range(args.batch)]
    models = {
        "retinanet": build("configs/COCO/retinanet_R50_1x.yaml", [], args, inputs),
        "solo": build("configs/COCO/solo_R50_1x.yaml", ["MODEL.SOLO.HEAD", args.head], args, inputs),
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for _ in range(args.repeats):
            for name, model in models.items():
                seconds[name].append(seconds_of(lambda model=model: model(inputs), args.device))
    medians = {name: statistics.median(values) / args.batch for name, values in seconds.items()}
    line = {"device": args.device, "size": size, "batch": args.batch, "instances": args.instances, "head": args.head}
    line |= {f"{name}_s_per_image": round(value, 4) for name, value in medians.items()}
    sys.stdout.write(
        json.dumps({**line, "solo_over_retinanet": round(medians["solo"] / medians["retinanet"], 3)}) + "\n"
    )


if __name__ == "__main__":
    main()
