#!/usr/bin/env python
"""Time that a training image of a segmentor takes to load, over that of a detector.

    python benchmarks/label_maps.py                                  # images of 480 x 640 and of 1024 x 2048
    python benchmarks/label_maps.py --images 50 --repeats 7

Both read the same JPEG files. The segmentor's mapper resizes image and label map to half to twice the size, cuts 512 x
512 (512 x 1024) pixels, flips and distorts colors; the detector's resizes the shorter side to 640 to 800 pixels (800 to
1024), as Detectron2's recipes do, and flips, with ten boxes an image. Both run in this process and take turns; time is
that of the processor, as the median of the turns.
"""

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.config import add_distill_config
from d2kd.data.mapper import build_mapper
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import BoxMode

CLASSES = 19
#: Height and width of the images, crop of the segmentor, shorter sides and longest side of the detector.
CASES = {
    "480 x 640": ((480, 640), [512, 512], range(640, 801, 32), 1333),
    "1024 x 2048": ((1024, 2048), [512, 1024], range(800, 1025, 32), 2048),
}


def write_records(root: Path, size: tuple[int, int], count: int) -> list[dict[str, Any]]:
    """Smooth noise, label maps of large regions, and boxes."""
    random, (height, width) = np.random.default_rng(0), size
    records = []
    for i in range(count):
        coarse = random.integers(0, 256, (height // 16, width // 16, 3), np.uint8)
        regions = random.integers(0, CLASSES, (4, 8)).astype(np.uint8)
        files = str(root / f"{i}.jpg"), str(root / f"{i}.png")
        cv2.imwrite(files[0], cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))
        cv2.imwrite(files[1], cv2.resize(regions, (width, height), interpolation=cv2.INTER_NEAREST))
        corners = random.uniform(0, 0.5, (10, 2)) * (width, height)
        boxes = np.concatenate([corners, corners + random.uniform(20, 200, (10, 2))], axis=1)
        objects = [{"bbox": b.tolist(), "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0} for b in boxes]
        record = {"file_name": files[0], "height": height, "width": width, "image_id": i}
        records.append({**record, "sem_seg_file_name": files[1], "annotations": objects})
    return records


def config(keys: dict[str, Any]) -> CfgNode:
    """A configuration with some keys changed."""
    cfg = get_cfg()
    add_distill_config(cfg)
    cfg.merge_from_list([item for pair in keys.items() for item in pair])
    return cfg


def mappers(size: tuple[int, int], crop: list[int], short: range, long: int) -> dict[str, Callable[..., Any]]:
    """The mappers of a segmentor and of a detector."""
    segmentor = {
        "MODEL.META_ARCHITECTURE": "SemanticSegmentor",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": CLASSES,
        "INPUT.MIN_SIZE_TRAIN": (size[0] // 2, size[0] * 2),
        "INPUT.MIN_SIZE_TRAIN_SAMPLING": "range",
        "INPUT.MAX_SIZE_TRAIN": size[1] * 2,
        "INPUT.CROP.ENABLED": True,
        "INPUT.CROP.TYPE": "absolute",
        "INPUT.CROP.SIZE": crop,
        "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": 0.75,
        "INPUT.COLOR_AUG_SSD": True,
    }
    detector = {
        "MODEL.META_ARCHITECTURE": "RetinaNet",
        "INPUT.MIN_SIZE_TRAIN": tuple(short),
        "INPUT.MAX_SIZE_TRAIN": long,
    }
    return {"segmentor": build_mapper(config(segmentor), True), "detector": build_mapper(config(detector), True)}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    logging.disable(logging.INFO)
    cv2.setNumThreads(1)
    print("| images | segmentor | detector | ratio |\n| --- | ---: | ---: | ---: |")
    for name, (size, *how) in CASES.items():
        with tempfile.TemporaryDirectory() as directory:
            records = write_records(Path(directory), size, args.images)
            of_detector = [{k: v for k, v in r.items() if k != "sem_seg_file_name"} for r in records]
            of_segmentor = [{k: v for k, v in r.items() if k != "annotations"} for r in records]
            given = {"segmentor": of_segmentor, "detector": of_detector}
            spent: dict[str, list[float]] = {name: [] for name in given}
            calls = mappers(size, *how)
            for _ in range(args.repeats):
                np.random.seed(0)
                for kind, mapper in calls.items():
                    start = time.process_time()
                    for record in given[kind]:
                        mapper(record)
                    spent[kind].append((time.process_time() - start) / args.images)
        ratio = statistics.median(a / b for a, b in zip(spent["segmentor"], spent["detector"]))
        times = " | ".join(f"{1000 * statistics.median(values):.1f} ms" for values in spent.values())
        print(f"| {name} | {times} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
