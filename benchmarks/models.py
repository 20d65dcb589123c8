#!/usr/bin/env python
"""Training and inference speed of the models that d2kd's recipes use, in images per second, and where the time goes.

    python benchmarks/models.py                       # 512 x 512 pixels, batch 2
    python benchmarks/models.py --only retinanet --profile
    python benchmarks/models.py --size 1024 --batch 8 --device cuda

Weights and images are random. Every model runs in a process of its own, so peak memory is its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from common import peak_memory_mib, random_batch, timed
from torch.profiler import ProfilerActivity, profile

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.engine import load_config
from d2kd.modeling import num_classes
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

_CITYSCAPES = "configs/Cityscapes/pspnet_R101.yaml"
_LEVELS = ["res2", "res3", "res4", "res5"]
_FPN = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.RESNETS.STEM_TYPE", "basic"]
_FPN += ["MODEL.RESNETS.RES4_DILATION", 1, "MODEL.RESNETS.RES5_DILATION", 1, "MODEL.RESNETS.OUT_FEATURES", _LEVELS]
_FPN += ["MODEL.FPN.IN_FEATURES", _LEVELS, "MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead"]
_FPN += ["MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p2", "p3", "p4", "p5"], "MODEL.SEM_SEG_HEAD.CONVS_DIM", 128]
_R18 = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]

MODELS = {
    "retinanet_R50": ("configs/COCO/retinanet_R50_1x.yaml", []),
    "faster_rcnn_R50": ("configs/COCO/faster_rcnn_R50_1x.yaml", []),
    "mask_rcnn_R50": ("configs/COCO/mask_rcnn_R50_1x.yaml", []),
    "cascade_mask_rcnn_R50": (
        "configs/COCO/mask_rcnn_R50_1x.yaml",
        ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True],
    ),
    "fcos_R50": ("configs/COCO/fcos_R50_1x.yaml", []),
    "gfl_R50": ("configs/COCO/gfl_R50_1x.yaml", []),
    "reppoints_R50": ("configs/COCO/reppoints_R50_1x.yaml", []),
    "solo_R50": ("configs/COCO/solo_R50_1x.yaml", []),
    "solo_decoupled_R50": ("configs/COCO/solo_decoupled_R50_3x.yaml", []),
    "mask_rcnn_ViTS": ("configs/COCO/mask_rcnn_ViTS.yaml", ["MODEL.VIT.SQUARE_PAD", 0]),
    # segmentors on one backbone; the last three at an output stride of 8
    "semantic_fpn_R50": (_CITYSCAPES, [*_FPN, "MODEL.RESNETS.DEPTH", 50]),
    "pspnet_R50": (_CITYSCAPES, ["MODEL.RESNETS.DEPTH", 50]),
    "deeplabv3_R50": ("configs/Cityscapes/deeplabv3_R101.yaml", ["MODEL.RESNETS.DEPTH", 50]),
    "deeplabv3_R50_windows": (
        "configs/Cityscapes/deeplabv3_R101.yaml",
        ["MODEL.RESNETS.DEPTH", 50, "TEST.SLIDING_WINDOW.ENABLED", True]
        + ["TEST.SLIDING_WINDOW.SIZE", [257, 257], "TEST.SLIDING_WINDOW.STRIDE", [171, 171]],
    ),
    "semantic_fpn_R18": (_CITYSCAPES, [*_FPN, *_R18]),
    "pspnet_R18": ("configs/Cityscapes/pspnet_R18_40k.yaml", []),
    "deeplabv3_R18": ("configs/Cityscapes/deeplabv3_R18_40k.yaml", []),
    "deeplabv3_MobileNetV2": ("configs/Cityscapes/deeplabv3_MobileNetV2_80k.yaml", []),
}


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Images per second of training and inference, and peak memory."""
    torch.manual_seed(0)
    path, options = MODELS[name]
    cfg = load_config(path, [*options, "MODEL.WEIGHTS", "", "MODEL.DEVICE", args.device])
    model = build_model(cfg).to(args.device)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    batch = random_batch(args.size, args.batch, num_classes(cfg)[1], cfg.MODEL.MASK_ON)

    def train() -> None:
        optimizer.zero_grad()
        sum(model(batch).values()).backward()
        optimizer.step()

    @torch.no_grad()
    def infer() -> None:
        model(batch)

    result: dict[str, Any] = {"model": name, "device": args.device, "size": args.size, "batch": args.batch}
    with EventStorage():
        for mode, call in (("train", train), ("inference", infer)):
            model.train(mode == "train")
            call()
            clock = time.process_time if args.processor_time else time.perf_counter
            seconds = statistics.median(timed(call, args.device, clock) for _ in range(args.repeats))
            result[f"{mode}_images_per_s"] = round(args.batch / seconds, 3)
            if args.profile:
                write_profile(name, mode, call, args)
    return {**result, "peak_MiB": round(peak_memory_mib(args.device))}


def write_profile(name: str, mode: str, call: Any, args: argparse.Namespace) -> None:
    """Writes the operators that take most of a call's time."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if args.device.startswith("cuda") else [])
    with profile(activities=activities) as profiler:
        call()
    key = "self_cuda_time_total" if args.device.startswith("cuda") else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=key, row_limit=12, max_name_column_width=40)
    sys.stderr.write(f"\n{name}, {mode}\n{table}\n")


def main() -> None:
    """One JSON line a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--size", type=int, default=512, help="image side in pixels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processor-time", action="store_true", help="by the processor's clock: on a busy machine")
    parser.add_argument("--profile", action="store_true", help="show the operators that take most time (stderr)")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_this_process:
        sys.stdout.write(json.dumps(measure(args.only, args)) + "\n")
        return
    for name in (n for n in MODELS if args.only in n):
        subprocess.run([sys.executable, *sys.argv, "--only", name, "--in-this-process"], check=True)


if __name__ == "__main__":
    main()
