#!/usr/bin/env python
"""Time of COCO's evaluation protocol: pycocotools against what is used where faster-coco-eval is installed.

    python benchmarks/evaluation.py                        # boxes: 5,000 images, 80 classes, 100 detections each
    python benchmarks/evaluation.py --images 500 --tasks bbox segm

Ground truth and detections are random, as many objects an image as COCO has; half of the detections lie near an object.
Every metric of both ways must be equal.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import d2kd  # noqa: F401  (makes `detectron2` importable)
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

SIZE, CLASSES, OBJECTS = 256, 80, 7
NAME = "random_boxes"


def random_boxes(count: int, random: np.random.Generator) -> np.ndarray:
    """(count, 4) XYXY inside the image, sides from 8 to 128 pixels."""
    sides = random.uniform(8, 128, (count, 2))
    corner = random.uniform(0, 1, (count, 2)) * (SIZE - sides)
    return np.concatenate([corner, corner + sides], axis=1)


def ground_truth(images: int, random: np.random.Generator) -> dict[str, Any]:
    """A dataset in COCO's format, objects as rectangles."""
    annotations: list[dict[str, Any]] = []
    for image in range(1, images + 1):
        for x0, y0, x1, y1 in random_boxes(OBJECTS, random).round(2).tolist():
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(random.integers(1, CLASSES + 1)),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
                    "iscrowd": 0,
                }
            )
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": SIZE, "height": SIZE} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": k, "name": str(k)} for k in range(1, CLASSES + 1)],
    }


def detections(objects: list[dict[str, Any]], count: int, masks: bool, random: np.random.Generator) -> Instances:
    """`count` detections in an image; every second one is an object, moved by some pixels."""
    boxes = random_boxes(count, random)
    classes = random.integers(CLASSES, size=count)
    for i in range(0, count, 2):
        chosen = objects[int(random.integers(len(objects)))]
        x, y, w, h = chosen["bbox"]
        boxes[i] = np.array([x, y, x + w, y + h]) + random.normal(0, 3, 4)
        classes[i] = chosen["category_id"] - 1
    found = Instances((SIZE, SIZE), pred_boxes=Boxes(torch.from_numpy(boxes)), pred_classes=torch.from_numpy(classes))
    found.pred_boxes.clip((SIZE, SIZE))
    found.scores = torch.from_numpy(random.uniform(size=count))
    if masks:
        x0, y0, x1, y1 = found.pred_boxes.tensor.round().long()[:, :, None, None].unbind(1)
        y, x = torch.arange(SIZE)[:, None], torch.arange(SIZE)
        found.pred_masks = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
    return found


def measure(args: argparse.Namespace, task: str, directory: Path) -> dict[str, Any]:
    """Seconds of both ways, from the detections to the metrics.

    Raises:
        AssertionError: a metric differs.
    """
    random = np.random.default_rng(0)
    content = ground_truth(args.images, random)
    (directory / "truth.json").write_text(json.dumps(content))
    register_coco_instances(NAME, {}, str(directory / "truth.json"), str(directory))
    DatasetCatalog.get(NAME)  # sets the numbers of the classes in the metadata
    by_image: dict[int, list[dict[str, Any]]] = {}
    for annotation in content["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    evaluators = {fast: COCOEvaluator(NAME, tasks=(task,), distributed=False, use_fast_impl=fast) for fast in (0, 1)}
    for evaluator in evaluators.values():
        evaluator.reset()
    for image, objects in by_image.items():
        found = detections(objects, args.detections, task == "segm", random)
        for evaluator in evaluators.values():
            evaluator.process([{"image_id": image}], [{"instances": found}])
    seconds, metrics = [], []
    for evaluator in evaluators.values():
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            metrics.append(evaluator.evaluate()[task])
        seconds.append(round(time.perf_counter() - start, 2))
    np.testing.assert_allclose(list(metrics[0].values()), list(metrics[1].values()), rtol=0, atol=1e-9)
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop(NAME)
    return {"pycocotools_s": seconds[0], "d2kd_s": seconds[1], "AP": metrics[1]["AP"]}


def main() -> None:
    """One JSON line a task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100, help="an image")
    parser.add_argument("--tasks", nargs="+", choices=("bbox", "segm"), default=["bbox"])
    args = parser.parse_args()
    for task in args.tasks:
        with tempfile.TemporaryDirectory() as directory:
            result = measure(args, task, Path(directory))
        line = {"task": task, "images": args.images, "detections": args.detections, **result}
        sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
