"""Which object a detection finds: the overlap of boxes or masks, and the match that pictures color by."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as mask_util

from detectron2.structures import BoxMode

#: From this overlap on, a detection of the right class has found an object.
FOUND_FROM = 0.5


class Objects(NamedTuple):
    """The objects of an image, crowds left out."""

    boxes: np.ndarray  # (M, 4) XYXY in pixels
    labels: np.ndarray  # (M,) contiguous class ids
    masks: Sequence[Any]  # M segmentations in COCO's format, or None


def objects_of(record: dict[str, Any]) -> Objects:
    """The true objects of an image in Detectron2's format."""
    annotations = [a for a in record.get("annotations", []) if not a.get("iscrowd", 0)]
    boxes = [BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    labels = np.array([a["category_id"] for a in annotations], dtype=int)
    return Objects(np.array(boxes, dtype=float).reshape(-1, 4), labels, [a.get("segmentation") for a in annotations])


def detected(predictions: Sequence[dict[str, Any]]) -> Objects:
    """What `read_predictions` gives for an image, as objects."""
    boxes = np.array([p["box"] for p in predictions], dtype=float).reshape(-1, 4)
    return Objects(boxes, np.array([p["label"] for p in predictions], dtype=int), [p.get("mask") for p in predictions])


def match(found: Objects, truth: Objects, size: tuple[int, int] | None = None) -> np.ndarray:
    """The object that each detection finds: of its class, overlapping by `FOUND_FROM`, and taken by no better one.

    Whether a detection finds an object depends on those before it only, so that leaving out what is below a score
    changes nothing for the rest.

    Args:
        found: N detections, best first.
        truth: M objects.
        size: (height, width) of the image, to compare masks where both have one; None compares boxes.

    Returns:
        int (N,), -1 for those that find none.
    """
    overlap = box_iou(found.boxes, truth.boxes)
    if size is not None:
        _put_mask_iou(overlap, found.masks, truth.masks, size)
    overlap[found.labels[:, None] != truth.labels[None]] = 0
    finds = np.full(len(overlap), -1)
    for number in range(len(overlap) if len(truth.boxes) else 0):
        best = overlap[number].argmax()
        if overlap[number, best] >= FOUND_FROM:
            finds[number] = best
            overlap[:, best] = 0
    return finds


def judge(
    predictions: Sequence[dict[str, Any]], record: dict[str, Any], lowest: float, size: tuple[int, int] | None = None
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The detections of an image from a score on, best first, and what `match` says of each.

    As in COCO's evaluation, those that find nothing but lie half or more within a crowd of their class do not count,
    and are left out.

    Args:
        predictions: what `read_predictions` gives for the image.
        record: the image in Detectron2's format.
        lowest: score.
        size: as for `match`.
    """
    usable = [p for p in predictions if p["score"] >= lowest and np.isfinite(p["box"]).all()]  # as of diverged models
    found = sorted(usable, key=lambda p: -p["score"])
    objects = detected(found)
    finds = match(objects, objects_of(record), size)
    crowds = objects_of(
        {"annotations": [{**a, "iscrowd": 0} for a in record.get("annotations", []) if a.get("iscrowd")]}
    )
    within = _shared(objects.boxes, crowds.boxes) >= 0.5 * _areas(objects.boxes)[:, None]
    counts = (finds >= 0) | ~(within & (objects.labels[:, None] == crowds.labels[None])).any(1)
    return [p for p, counted in zip(found, counts) if counted], finds[counts]


def box_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (N, 4) and (M, 4), XYXY: (N, M)."""
    shared = _shared(boxes, others)
    return shared / np.maximum(_areas(boxes)[:, None] + _areas(others)[None] - shared, 1e-9)


def _shared(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    corner = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.clip(corner - np.maximum(boxes[:, None, :2], others[None, :, :2]), 0, None).prod(2)


def _areas(boxes: np.ndarray) -> np.ndarray:
    return np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(1)


def run_lengths(segmentation: Any, height: int, width: int) -> Any:
    """Polygons, an RLE, compressed or not, or a bitmap, as a compressed RLE."""
    if isinstance(segmentation, np.ndarray):
        return mask_util.encode(np.asfortranarray(segmentation.astype(np.uint8)))
    if isinstance(segmentation, list):
        return mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return mask_util.frPyObjects(segmentation, height, width)
    return segmentation


def bitmap(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Polygons, an RLE, compressed or not, or a bitmap, as uint8 (height, width)."""
    if isinstance(segmentation, np.ndarray):
        return segmentation.astype(np.uint8)
    return mask_util.decode(run_lengths(segmentation, height, width))


def _put_mask_iou(overlap: np.ndarray, masks: Sequence[Any], others: Sequence[Any], size: tuple[int, int]) -> None:
    rows, columns = ([n for n, mask in enumerate(m) if mask is not None and len(mask)] for m in (masks, others))
    if rows and columns:
        ours, theirs = [masks[n] for n in rows], [others[n] for n in columns]
        ious = mask_util.iou(
            [run_lengths(m, *size) for m in ours], [run_lengths(m, *size) for m in theirs], [0] * len(theirs)
        )
        overlap[np.ix_(rows, columns)] = ious
