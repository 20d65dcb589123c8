#!/usr/bin/env python
"""Images a second of the training loader of classifiers, against timm's own with the same augmentation.

    python benchmarks/loading.py                                  # 384 JPEGs of 300 x 400, with 0 workers and with 1
    python benchmarks/loading.py --recipes plain --workers 4 --images 2000

Both read the same files and run timm's transforms in the same order; `plain` is a random crop with a flip, `strong`
RandAugment, mixup, cutmix and random erasing. Both end with normalized float32 batches on the CPU: timm's prefetcher
makes them, and with d2kd the model does. The two take turns, and the median of `--repeats` epochs counts.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import FastCollateMixup, ImageDataset, create_loader

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.config import add_distill_config
from d2kd.data.datasets import register_datasets
from d2kd.data.loader import build_train_loader
from detectron2.config import CfgNode, get_cfg

CLASSES, SIZE = 10, 224
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {"COLOR_JITTER": 0.0},
    # at magnitude 9 and more, timm asks Pillow for posterization to 0 bits, which newer versions refuse
    "strong": {"AUTO_AUGMENT": "rand-m7-mstd0.5-inc1", "MIXUP": 0.8, "CUTMIX": 1.0, "ERASING.PROB": 0.25},
}


def write_images(root: Path, count: int) -> None:
    """Writes JPEGs of 300 x 400 pixels (height x width), smooth noise, one folder a class."""
    random = np.random.default_rng(0)
    for i in range(count):
        coarse = random.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        folder = root / f"class_{i % CLASSES}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(coarse).resize((400, 300), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)


def config(root: Path, recipe: dict[str, Any], batch: int, workers: int) -> CfgNode:
    """The configuration of a classifier on these images."""
    cfg = get_cfg()
    add_distill_config(cfg)
    keys = {f"INPUT.CLASSIFICATION.{key}": value for key, value in recipe.items()}
    keys |= {"MODEL.META_ARCHITECTURE": "ImageClassifier", "MODEL.DEVICE": "cpu", "INPUT.FORMAT": "RGB"}
    keys |= {"MODEL.PIXEL_MEAN": MEAN, "MODEL.PIXEL_STD": STD, "MODEL.CLASSIFIER.NUM_CLASSES": CLASSES}
    keys |= {"DATASETS.TRAIN": ("noise",), "DATALOADER.NUM_WORKERS": workers, "SOLVER.IMS_PER_BATCH": batch}
    keys |= {"DATASETS.REGISTER": [{"NAME": "noise", "FORMAT": "folders", "IMAGES": str(root)}], "SEED": 0}
    cfg.merge_from_list([item for pair in keys.items() for item in pair])
    return cfg


def ours(cfg: CfgNode) -> Iterable[torch.Tensor]:
    """Normalized batches of d2kd, stacked and normalized as in a model."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    for batch in build_train_loader(cfg):
        yield torch.stack([x["image"] for x in batch]).float().sub_(mean).div_(std)


def timms(cfg: CfgNode, root: Path) -> Iterable[torch.Tensor]:
    """Normalized batches of timm, epoch after epoch."""
    node = cfg.INPUT.CLASSIFICATION
    mixes = node.MIXUP > 0 or node.CUTMIX > 0
    loader = create_loader(
        ImageDataset(str(root)),
        (3, SIZE, SIZE),
        cfg.SOLVER.IMS_PER_BATCH,
        is_training=True,
        color_jitter=node.COLOR_JITTER,
        auto_augment=node.AUTO_AUGMENT or None,
        interpolation=node.INTERPOLATION,
        re_prob=node.ERASING.PROB,
        re_mode=node.ERASING.MODE,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=FastCollateMixup(node.MIXUP, node.CUTMIX, num_classes=CLASSES) if mixes else None,
        persistent_workers=cfg.DATALOADER.NUM_WORKERS > 0,
        device=torch.device("cpu"),
    )
    while True:
        yield from (images for images, _ in loader)


def images_a_second(batches: Iterable[torch.Tensor], count: int) -> Callable[[], float]:
    """Times the next `count` batches with each call; the first call is a warm-up that starts the workers."""
    stream = iter(batches)

    def measure() -> float:
        start, seen = time.perf_counter(), 0
        for _ in range(count):
            seen += len(next(stream))
        return seen / (time.perf_counter() - start)

    measure()
    return measure


def main() -> None:
    """One JSON line a recipe and number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    count = args.images // args.batch
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_images(root, args.images)
        for recipe in args.recipes:
            for workers in args.workers:
                cfg = config(root, RECIPES[recipe], args.batch, workers)
                register_datasets(cfg)
                measures = [images_a_second(batches, count) for batches in (ours(cfg), timms(cfg, root))]
                rates = [[measure() for measure in measures] for _ in range(args.repeats)]
                own, other = (statistics.median(rate) for rate in zip(*rates))
                line = {"recipe": recipe, "workers": workers, "d2kd_per_s": round(own), "timm_per_s": round(other)}
                sys.stdout.write(json.dumps({**line, "ratio": round(own / other, 3)}) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
