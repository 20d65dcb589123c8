#!/usr/bin/env python
"""What exported networks give and take: worst difference on five images of other sizes, file size, latency.

    pip install 'd2kd[onnx]'
    python benchmarks/export.py [--size 160] [--only "RetinaNet R50" "FCOS R50"] > benchmarks/results/export.txt

The networks of the recipes, after they have learned four images of PhotoDigits a little: the scores of an untrained
network are all about the same. The same inputs in all of them; medians of several runs of five images and a batch of
two, in one thread.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import overfit
import torch
from torch import nn

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.engine import load_config
from d2kd.export import ExportError, export_model, exported
from d2kd.export.images import example_images
from d2kd.modeling.architectures import architecture_class
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

NETWORKS = {
    "RetinaNet R50": "COCO/retinanet_R50_1x.yaml",
    "FCOS R50": "COCO/fcos_R50_1x.yaml",
    "GFL R50": "COCO/gfl_R50_1x.yaml",
    "RepPoints R50": "COCO/reppoints_R50_1x.yaml",
    "Faster R-CNN R50": "COCO/faster_rcnn_R50_1x.yaml",
    "Mask R-CNN R50": "COCO/mask_rcnn_R50_1x.yaml",
    "Cascade Mask R-CNN X101": "COCO/cascade_mask_rcnn_X101.yaml",
    "SOLO R50": "COCO/solo_R50_1x.yaml",
    "PSPNet R18": "Cityscapes/pspnet_R18_80k.yaml",
    "DeepLabV3 R18": "Cityscapes/deeplabv3_R18_80k.yaml",
    "ResNet-18": "ImageNet/resnet18.yaml",
}
SUFFIX = {"torchscript": ".pt", "onnx": ".onnx"}
COLUMNS = (
    "| architecture | format | precision | compared | scores differ by | boxes by, px | MB | ms an input | eager |"
)


def eager_seconds(cfg: Any, network: nn.Module, repeats: int) -> float:
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
    parser.add_argument("--size", type=int, default=160, help="of the images, in pixels")
    parser.add_argument("--iterations", type=int, default=40, help="that each network learns")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--formats", nargs="+", choices=SUFFIX, default=list(SUFFIX))
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "fp16"), default=["fp32", "fp16"])
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, CPU, one thread; images of about {args.size} pixels\n")
    print(f"{COLUMNS}\n{'| --- ' * 3}{'| ---: ' * 6}|")
    for name in args.only:
        cfg, network = trained(name, args)
        eager = eager_seconds(cfg, network, args.repeats)
        for file_format in args.formats:
            for precision in args.precisions:
                print(row(name, cfg, network, file_format, precision, args.repeats, eager), flush=True)


def trained(name: str, args: argparse.Namespace) -> tuple[Any, nn.Module]:
    """Returns configuration and model; segmentors and classifiers are not trained, whose outputs are compared whole."""
    config = f"configs/{NETWORKS[name]}"
    options = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "DISTILL.TEACHER.CONFIG_FILE", ""]
    options += ["TEST.SLIDING_WINDOW.ENABLED", False, "INPUT.MIN_SIZE_TEST", args.size, "TEST.AUG.ENABLED", False]
    cfg = load_config(config, [*options, "INPUT.MAX_SIZE_TEST", 2 * args.size])
    if architecture_class(cfg).CLASSIFIES_IMAGES or "Segmentor" in cfg.MODEL.META_ARCHITECTURE:
        return cfg, build_model(cfg).eval()
    how = {"config": config, "images": 4, "iterations": args.iterations, "size": args.size, "data": None}
    with tempfile.TemporaryDirectory() as folder:
        data = argparse.Namespace(**how, device="cpu", opts=["TEST.EVAL_PERIOD", "0", "DATASETS.TEST", "()"])
        trainer = overfit.train(data, Path(folder))[0]
    for dataset in ("overfit_objects", "overfit_labels"):  # the next network registers them again
        DatasetCatalog.remove(dataset)
        MetadataCatalog.remove(dataset)
    cfg = trainer.cfg.clone()
    cfg.defrost()
    cfg.INPUT.MAX_SIZE_TEST = 2 * args.size
    return cfg, trainer.student.eval()


def row(name: str, cfg: Any, network: nn.Module, file_format: str, precision: str, repeats: int, eager: float) -> str:
    """Returns a row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"x{SUFFIX[file_format]}")
        try:
            found = export_model(cfg, network, path, file_format, precision=precision, repeats=repeats)
        except ExportError as error:
            words = str(error).replace(f"{path}", "it")[:160]
            return f"| {name} | {file_format} | {precision} | not exported: {words} |  |  |  |  |  |"
        size = path.stat().st_size / 1e6
    milliseconds = [1000 * seconds / len(found.sizes) for seconds in (sum(found.seconds), eager)]
    return (
        f"| {name} | {file_format} | {precision} | {found.compared:,} | {found.scores:.1e} | {found.boxes:.1e} | "
        f"{size:.1f} | {milliseconds[0]:.0f} | {milliseconds[1]:.0f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
