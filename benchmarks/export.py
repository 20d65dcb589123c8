#!/usr/bin/env python
"""What exported networks give and take: worst difference on five images of other sizes, file size, latency.

    pip install 'd2kd[onnx]'
    python benchmarks/export.py [--side 160] [--architectures RetinaNet FCOS] > benchmarks/results/export.txt

The networks are narrow and have random weights, so that the differences are those of the arithmetic and the latencies
say what the runtime adds or saves, not what a trained student takes. One thread; medians of several runs of the five
images and the batch of two.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import d2kd  # noqa: F401  (makes `detectron2` importable)

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/d2kd"))
from models import RETINANET, config, model

from d2kd.export import ExportError, export_model, exported
from d2kd.export.images import example_images

PIXELS = {
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.SEM_SEG_HEAD.NAME": "SemSegFPNHead",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 5,
}
WIDE = {"MODEL.FPN.OUT_CHANNELS": 64, "MODEL.RETINANET.NUM_CONVS": 2, "MODEL.RETINANET.SCORE_THRESH_TEST": 0.05}
NETWORKS = {
    "RetinaNet": {**RETINANET, **WIDE},
    "FCOS": {**RETINANET, **WIDE, "MODEL.META_ARCHITECTURE": "FCOS", "MODEL.FCOS.NORM": "BN"},
    "SemanticSegmentor": {**PIXELS, "MODEL.META_ARCHITECTURE": "SemanticSegmentor"},
    "ImageClassifier": {
        "MODEL.META_ARCHITECTURE": "ImageClassifier",
        "MODEL.BACKBONE.NAME": "build_resnet_backbone",
        "MODEL.RESNETS.OUT_FEATURES": ["res5"],
        "MODEL.CLASSIFIER.NUM_CLASSES": 10,
    },
}
SUFFIX = {"torchscript": ".pt", "onnx": ".onnx"}


def eager_seconds(cfg: object, network: torch.nn.Module, repeats: int) -> float:
    """Returns the median time of the model itself on the same images, summed over them."""
    wrapped = exported(network)
    total = 0.0
    with torch.no_grad():
        for images in example_images(cfg, wrapped):
            taken = []
            for _ in range(repeats + 1):
                start = time.perf_counter()
                wrapped.eager(images)
                taken.append(time.perf_counter() - start)
            total += statistics.median(taken[1:])
    return total


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=160, help="INPUT.MIN_SIZE_TEST")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--architectures", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--formats", nargs="+", choices=SUFFIX, default=list(SUFFIX))
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "fp16"), default=["fp32", "fp16"])
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, CPU, one thread; images of about {args.side} pixels\n")
    print(
        "| architecture | format | precision | compared | scores differ by | boxes by, px | MB | ms an input | eager |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in args.architectures:
        cfg = config(NETWORKS[name], INPUT__MIN_SIZE_TEST=args.side, INPUT__MAX_SIZE_TEST=2 * args.side)
        cfg.INPUT.CLASSIFICATION.SIZE = args.side
        network = model(cfg).eval()
        if hasattr(network, "anchor_generator"):  # of random weights all scores would be about the same
            network.head.cls_score.weight.data *= 30
        eager = eager_seconds(cfg, network, args.repeats)
        for file_format in args.formats:
            for precision in args.precisions:
                print(row(name, cfg, network, file_format, precision, args.repeats, eager), flush=True)


def row(
    name: str, cfg: object, network: torch.nn.Module, file_format: str, precision: str, repeats: int, eager: float
) -> str:
    """Returns a row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"x{SUFFIX[file_format]}")
        try:
            found = export_model(cfg, network, path, file_format, precision=precision, repeats=repeats)
        except ExportError as error:
            return f"| {name} | {file_format} | {precision} | not exported: {str(error)[:120]} |  |  |  |  |  |"
        size = path.stat().st_size / 1e6
    milliseconds = [1000 * seconds / len(found.sizes) for seconds in (sum(found.seconds), eager)]
    return (
        f"| {name} | {file_format} | {precision} | {found.compared} | {found.scores:.1e} | {found.boxes:.1e} | "
        f"{size:.1f} | {milliseconds[0]:.0f} | {milliseconds[1]:.0f} |"
    )


if __name__ == "__main__":
    main()
