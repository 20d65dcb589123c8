#!/usr/bin/env python
"""Overfits four images of PhotoDigits: a model that is built and trained rightly finds all that it has seen.

    python benchmarks/overfit.py --config configs/PhotoDigits/reppoints_student.yaml
    python benchmarks/overfit.py --config configs/PhotoDigits/solo_student.yaml --size 512 \\
        MODEL.SOLO.SCALE_RANGES "[[1, 128], [96, 192], [144, 256], [192, 1024]]"
    python benchmarks/overfit.py --config configs/PhotoDigits/pspnet_teacher.yaml --size 256 --iterations 400 \\
        --at-least 95 SOLVER.BASE_LR 0.003
    python benchmarks/overfit.py --config configs/COCO/mask_rcnn_R50_1x.yaml --iterations 300 SOLVER.BASE_LR 0.0005

For any configuration of a detector or segmentor: its model learns four images, without pretrained weights, teacher,
augmentation, dropout or frozen layers, and is evaluated on them. One line of JSON has the metrics in percent. The
status is 1 where the first metric of a task (AP of boxes, AP of masks, mIoU) is below `--at-least`.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.config import leaves
from d2kd.engine import DistillTrainer, load_config
from d2kd.errors import ConfigError, UserError
from d2kd.evaluation.tasks import task_named
from d2kd.modeling.architectures import architecture_class
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.logger import setup_logger

NAME = "overfit"


def register(root: Path, count: int, directory: Path) -> dict[str, int]:
    """Registers the first images of PhotoDigits for objects, and their label maps for segmentors.

    Returns:
        The number of classes, by the field of metadata that lists them.
    """
    content = json.loads((root / "annotations/instances_train.json").read_text())
    images = content["images"][:count]
    shown = {image["id"] for image in images}
    objects = [a for a in content["annotations"] if a["image_id"] in shown]
    json_file = directory / "objects.json"
    json_file.write_text(json.dumps({**content, "images": images, "annotations": objects}))
    register_coco_instances(f"{NAME}_objects", {}, str(json_file), str(root / "train"))
    labels = [
        {
            "file_name": str(root / "train" / image["file_name"]),
            "sem_seg_file_name": str(root / "semseg_train" / image["file_name"]),
            **{key: image[key] for key in ("height", "width")},
            "image_id": image["id"],
        }
        for image in images
    ]
    names = ["background", *(c["name"] for c in content["categories"])]
    DatasetCatalog.register(f"{NAME}_labels", lambda: labels)
    MetadataCatalog.get(f"{NAME}_labels").set(evaluator_type="sem_seg", stuff_classes=names, ignore_label=255)
    return {"thing_classes": len(names) - 1, "stuff_classes": len(names)}


def changes(cfg: CfgNode, classes: dict[str, int], args: argparse.Namespace) -> Iterator[Any]:
    """Yields the keys and values by which any configuration learns these images."""
    architecture = architecture_class(cfg)
    counts = [count for count, _ in architecture.class_counts(cfg)]
    if not counts or architecture.CLASSIFIES_IMAGES:
        raise ConfigError(f"{args.config}: {cfg.MODEL.META_ARCHITECTURE} is no detector or segmentor that d2kd knows.")
    for count in counts:
        yield from (count.key, classes[count.metadata])
    dataset = f"{NAME}_objects" if counts[0].metadata == "thing_classes" else f"{NAME}_labels"
    yield from ("DATASETS.TRAIN", [dataset], "DATASETS.TEST", [dataset])
    for key, value in leaves(cfg):  # norms need the statistics of a network that starts from random weights
        if key.startswith("MODEL.") and key.endswith(".NORM") and value in ("FrozenBN", "SyncBN"):
            yield from (key, "BN")
        if key.startswith("MODEL.") and key.endswith("DROPOUT"):
            yield from (key, 0.0)
    yield from ("MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.DEVICE", args.device)
    yield from ("DISTILL.TEACHER.CONFIG_FILE", "", "DISTILL.TEACHER.WEIGHTS", "")
    yield from ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "choice")
    for split in ("TRAIN", "TEST"):
        shorter = [args.size] if split == "TRAIN" else args.size
        yield from (f"INPUT.MIN_SIZE_{split}", shorter, f"INPUT.MAX_SIZE_{split}", args.size)
    yield from ("INPUT.RANDOM_FLIP", "none", "INPUT.CROP.ENABLED", False, "INPUT.COLOR_AUG_SSD", False)
    yield from ("DATALOADER.NUM_WORKERS", 0)
    yield from ("SOLVER.MAX_ITER", args.iterations, "SOLVER.IMS_PER_BATCH", args.images, "SOLVER.STEPS", [])
    yield from ("SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", 0.001, "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR")
    yield from ("SOLVER.WARMUP_ITERS", 20, "SOLVER.CHECKPOINT_PERIOD", args.iterations, "SOLVER.AMP.ENABLED", False)
    yield from ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model")
    yield from ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 10.0, "TEST.EVAL_PERIOD", 0, "SEED", 1)


def train(args: argparse.Namespace, directory: Path) -> tuple[DistillTrainer, dict[str, Any]]:
    """Trains and evaluates; returns the trainer, which has the model, and the metrics of each task."""
    if args.data is None:
        args.data = Path(os.getenv("DETECTRON2_DATASETS", "datasets")) / "photo_digits"
        subprocess.run([sys.executable, "datasets/prepare_photo_digits.py"], check=True, stdout=subprocess.DEVNULL)
    classes = register(args.data, args.images, directory)
    cfg = load_config(args.config, args.opts)
    options = [*changes(cfg, classes, args), "OUTPUT_DIR", str(directory / "run"), *args.opts]
    torch.manual_seed(1)
    trainer = DistillTrainer(load_config(args.config, options))
    trainer.resume_or_load(resume=False)
    return trainer, trainer.train()


def overfit(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Trains and evaluates; returns the first metric of every task, and the time."""
    start = time.perf_counter()
    results = train(args, directory)[1]
    found = {
        f"{task}/{name}": 0.0 if math.isnan(metrics[name]) else metrics[name]  # of a model that finds nothing
        for task, metrics in results.items()
        for name in task_named(task).columns[:1]
    }
    return {
        "config": args.config,
        "iterations": args.iterations,
        **found,
        "seconds": round(time.perf_counter() - start),
    }


def main() -> None:
    """Writes one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML of a detector or segmentor")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--size", type=int, default=128, help="side that they are enlarged to, in pixels")
    parser.add_argument("--at-least", type=float, default=90.0, help="least metric of every task, in percent")
    parser.add_argument("--data", type=Path, help="a PhotoDigits that is there already")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--verbose", action="store_true", help="log the training (stderr)")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="changes to the configuration")
    args = parser.parse_args()
    if args.verbose:
        setup_logger(name="d2kd")
    with tempfile.TemporaryDirectory() as directory:
        try:
            result = overfit(args, Path(directory))
        except UserError as error:
            sys.exit(str(error))
    sys.stdout.write(json.dumps(result) + "\n")
    scores = [value for name, value in result.items() if "/" in name and name != "config"]
    sys.exit(0 if scores and min(scores) >= args.at_least else 1)


if __name__ == "__main__":
    main()
