"""Boxes: how many, how large as the model sees them, and which of them look like a mistake."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from detectron2.config import CfgNode
from detectron2.structures import BoxMode

from ..coco.check import BOX_TOLERANCE
from ..images import image_size
from .report import Report, describe_sizes, span

#: Shorter side, in pixels of the model's input, below which an object is tiny.
TINY = 4
#: IoU of two boxes that are taken for one object.
SAME = 0.95
#: Models whose boxes start from anchors, with the IoU from which on an anchor learns an object.
_ANCHORS = {"RetinaNet": 0.5, "GeneralizedRCNN": 0.7, "ProposalNetwork": 0.7, "PanopticFPN": 0.7}


@dataclass
class Objects:
    """All N objects of a dataset."""

    #: (N, 4) as corners, in pixels of the images.
    boxes: np.ndarray
    #: (N,): contiguous classes, numbers of images, and whether they are crowds.
    classes: np.ndarray
    images: np.ndarray
    crowds: np.ndarray
    #: (N, 2), width and height of the images.
    image_sizes: np.ndarray

    @classmethod
    def of(cls, records: Sequence[dict[str, Any]], sizes: Sequence[tuple[int, int]]) -> "Objects":
        """Collects those of records in Detectron2's format; `sizes` are those of the images."""
        annotations = [(i, a) for i, record in enumerate(records) for a in record["annotations"]]
        images = np.array([i for i, _ in annotations], dtype=int)
        return cls(
            boxes=np.array(
                [BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS) for _, a in annotations],
                dtype=float,
            ).reshape(-1, 4),
            classes=np.array([a["category_id"] for _, a in annotations], dtype=int),
            images=images,
            crowds=np.array([a.get("iscrowd", 0) for _, a in annotations], dtype=bool),
            image_sizes=np.array(sizes, dtype=float).reshape(-1, 2)[images],
        )

    @property
    def sides(self) -> np.ndarray:
        """Width and height, (N, 2)."""
        return self.boxes[:, 2:] - self.boxes[:, :2]


def inspect_objects(
    cfg: CfgNode, name: str, records: Sequence[dict[str, Any]], names: Sequence[str], is_train: bool
) -> Report:
    """Reports on a dataset of boxes.

    Args:
        cfg: gives the sizes that images have in evaluation, and anchors.
        name: of the dataset.
        records: in Detectron2's format, with "annotations".
        names: of the classes.
        is_train: whether it is trained on, for the words.
    """
    sizes = [(r["width"], r["height"]) if "width" in r else image_size(r["file_name"]) for r in records]
    objects = Objects.of(records, sizes)
    counted = ~objects.crowds
    per_class = np.bincount(objects.classes[counted], minlength=len(names)).tolist()
    crowds = f", crowds: {int(objects.crowds.sum())}" if objects.crowds.any() else ""
    report = Report(
        f"{name}: {len(records)} images, {int(counted.sum())} objects of {len(names)} classes{crowds}",
        columns=["class", "objects", "images", "median width x height"],
    )
    for label, class_name in enumerate(names):
        chosen = counted & (objects.classes == label)
        median = np.median(objects.sides[chosen], axis=0) if chosen.any() else None
        report.rows.append(
            [
                class_name,
                per_class[label],
                len(np.unique(objects.images[chosen])),
                "" if median is None else f"{median[0]:.0f} x {median[1]:.0f}",
            ]
        )
    report.facts.append(describe_sizes(sizes))
    scale = _scale(cfg, objects.image_sizes)[:, None]
    _tell_sizes(cfg, report, objects.sides[counted], objects.sides[counted] * scale[counted])
    _suspect(cfg, report, objects, objects.sides * scale, [os.path.basename(r["file_name"]) for r in records], is_train)
    report.compare_classes(names, per_class, "objects", is_train)
    return report


def _scale(cfg: CfgNode, sizes: np.ndarray) -> np.ndarray:
    """By what images are enlarged in evaluation, (N,): the shorter side has a size, and the longer one a largest."""
    if not cfg.INPUT.MIN_SIZE_TEST or not len(sizes):
        return np.ones(len(sizes))
    scale: np.ndarray = np.minimum(cfg.INPUT.MIN_SIZE_TEST / sizes.min(1), cfg.INPUT.MAX_SIZE_TEST / sizes.max(1))
    return scale


def _tell_sizes(cfg: CfgNode, report: Report, sides: np.ndarray, seen: np.ndarray) -> None:
    present = (sides > 0).all(1)
    if not present.any():
        return
    sides, seen = sides[present], seen[present]
    report.facts.append(
        f"objects: {span(np.sqrt(sides.prod(1)))} pixels (square root of the box's area); as the model sees them "
        f"(INPUT.MIN_SIZE_TEST {cfg.INPUT.MIN_SIZE_TEST}) {span(np.sqrt(seen.prod(1)))}"
    )
    needed = _ANCHORS.get(cfg.MODEL.META_ARCHITECTURE)
    if needed is not None:
        overlap = _best_anchor(cfg, seen)
        report.facts.append(
            f"anchors (MODEL.ANCHOR_GENERATOR): the best one of an object, in its place, has IoU "
            f"{np.median(overlap):.2f} in the median; {(overlap < needed).mean():.0%} of the objects have none of "
            f"{needed} or more"
        )


def _best_anchor(cfg: CfgNode, sides: np.ndarray) -> np.ndarray:
    """The IoU of each object (N, 2) with the anchor whose width and height fit it best, on one center: (N,)."""
    node = cfg.MODEL.ANCHOR_GENERATOR
    anchors = np.unique([s for level in node.SIZES for s in level])[:, None]
    ratios = np.sqrt(np.unique([r for level in node.ASPECT_RATIOS for r in level]))  # height / width
    shapes = np.stack([(anchors / ratios).ravel(), (anchors * ratios).ravel()], axis=1)
    best = np.zeros(len(sides))
    for shape in shapes:
        shared = np.minimum(sides, shape).prod(1)
        best = np.maximum(best, shared / (sides.prod(1) + shape.prod() - shared))
    return best


def _suspect(
    cfg: CfgNode, report: Report, objects: Objects, seen: np.ndarray, files: Sequence[str], is_train: bool
) -> None:
    def named(which: Any) -> list[str]:
        return [files[i] for i in objects.images[which]]

    empty = np.setdiff1d(np.arange(len(files)), objects.images)
    left_out = is_train and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    report.suspect(
        "images without objects",
        len(empty),
        [files[i] for i in empty],
        "They are left out of training (DATALOADER.FILTER_EMPTY_ANNOTATIONS)." if left_out else "",
        len(files),
    )
    flat = (objects.sides <= 0).any(1)
    outside = np.maximum(-objects.boxes[:, :2], objects.boxes[:, 2:] - objects.image_sizes).max(1) > BOX_TOLERANCE
    tiny = (seen.min(1) < TINY) & ~flat
    twice, other = _repeated(objects)
    for what, which, hint in (
        ("boxes without width or height", flat, ""),
        (f"boxes that reach out of their image by more than {BOX_TOLERANCE:g} pixel", outside, ""),
        (
            f"objects that the model sees with less than {TINY} pixels of width or height",
            tiny,
            "Raise INPUT.MIN_SIZE_TRAIN and MIN_SIZE_TEST, or remove them.",
        ),
        (f"objects in the place of another one of their class (IoU above {SAME})", twice, ""),
        (f"objects in the place of one of another class (IoU above {SAME})", other, ""),
    ):
        report.suspect(what, int(which.sum()), named(which), hint)


def _repeated(objects: Objects) -> tuple[np.ndarray, np.ndarray]:
    """Whether an object has the place of one before it, of its class and of another: (N,) each."""
    found = np.zeros((2, len(objects.boxes)), dtype=bool)
    starts = np.flatnonzero(np.diff(objects.images, prepend=-1))  # objects are in the order of images
    for start, end in zip(starts, [*starts[1:], len(objects.boxes)]):
        boxes, classes = objects.boxes[start:end], objects.classes[start:end]
        shared = np.clip(
            np.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - np.maximum(boxes[:, None, :2], boxes[None, :, :2]),
            0,
            None,
        ).prod(2)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        same = np.tril(shared > SAME * (areas[:, None] + areas[None] - shared), -1)
        alike = classes[:, None] == classes[None]
        found[0, start:end], found[1, start:end] = (same & alike).any(1), (same & ~alike).any(1)
    return found[0], found[1]
