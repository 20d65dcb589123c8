"""Ground truth and the detections of several models, boxes and masks, side by side on the same images."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util

from d2kd.visualization.points import draw_points
from detectron2.data import detection_utils
from detectron2.structures import BoxMode

TILE = 384  # side of a tile in pixels
HEADER = 44
GAP = 6
TRUTH, RIGHT, WRONG = (255, 255, 255), (80, 200, 60), (60, 60, 235)  # BGR
MASK_OPACITY = 0.45
FONT = cv2.FONT_HERSHEY_SIMPLEX


def detection_grid(
    dataset_dicts: Sequence[dict[str, Any]],
    class_names: Sequence[str],
    predictions: Mapping[str, Mapping[Any, list[dict[str, Any]]]],
    score_threshold: float = 0.3,
) -> np.ndarray:
    """Draws one row per image: the ground truth, then each model's detections, with class and score.

    A detection is green if its class is right and its IoU with an object that no better one has taken is at least
    0.5, and red otherwise. Masks and points are drawn where a model predicts some.

    Args:
        dataset_dicts: the images, in Detectron2's format.
        class_names: by contiguous class id.
        predictions: the result of `read_predictions` by the heading of the model's column.
        score_threshold: detections below it are left out.

    Returns:
        uint8 (H, W, 3) BGR.
    """
    rows = [header(["ground truth", *predictions])]
    # segmentations of data for models without masks may be anything
    draws_masks = any(p.get("mask") for images in predictions.values() for found in images.values() for p in found)
    for record in dataset_dicts:
        image = detection_utils.read_image(record["file_name"], format="BGR")
        scale = TILE / max(image.shape[:2])
        enlarged = resize(image, scale)
        truth_boxes, truth_labels, truth_masks = _ground_truth(record)
        texts = [class_names[label] for label in truth_labels]
        colors = [TRUTH] * len(texts)
        tinted = tint(enlarged, image.shape[:2], truth_masks if draws_masks else [], colors)
        tiles = [draw_boxes(tinted, truth_boxes * scale, texts, colors)]
        for by_image in predictions.values():
            found = [p for p in by_image.get(record["image_id"], []) if p["score"] >= score_threshold]
            found.sort(key=lambda p: -p["score"])
            boxes = np.array([p["box"] for p in found]).reshape(-1, 4)
            labels = np.array([p["label"] for p in found], dtype=int)
            right = is_right(boxes, labels, truth_boxes, truth_labels)
            texts = [f"{class_names[p['label']]} {p['score']:.2f}" for p in found]
            colors = [RIGHT if r else WRONG for r in right]
            tinted = tint(enlarged, image.shape[:2], [p.get("mask") for p in found], colors)
            tile = draw_boxes(tinted, boxes * scale, texts, colors)
            for detection, color in reversed(list(zip(found, colors))):  # the best on top
                draw_points(tile, np.reshape(detection.get("points", []), (-1, 2)) * scale, color)
            tiles.append(tile)
        rows.append(np.hstack([pad_tile(tile) for tile in tiles]))
    return np.vstack(rows)


def read_predictions(path: str, metadata: Any) -> dict[Any, list[dict[str, Any]]]:
    """Reads COCO's result format (coco_instances_results.json).

    Args:
        path: the file.
        metadata: of the dataset; maps category ids to contiguous class ids.

    Returns:
        By image id, a list of `{"box": XYXY, "label": contiguous class id, "score", "mask": RLE or None}`, with the
        "points" [[x, y], ...] of models that have written them.
    """
    to_contiguous = metadata.get("thing_dataset_id_to_contiguous_id")
    by_image: dict[Any, list[dict[str, Any]]] = {}
    with open(path) as file:
        results = json.load(file)
    for result in results:
        x, y, width, height = result["bbox"]
        category = result["category_id"]
        label = category if to_contiguous is None else to_contiguous[category]
        item = {"box": [x, y, x + width, y + height], "label": label, "score": result["score"]}
        if "points" in result:
            item["points"] = result["points"]
        item["mask"] = result.get("segmentation")
        by_image.setdefault(result["image_id"], []).append(item)
    return by_image


def is_right(
    boxes: np.ndarray, labels: np.ndarray, truth_boxes: np.ndarray, truth_labels: np.ndarray, iou: float = 0.5
) -> np.ndarray:
    """Whether each detection, best first, finds an object of its class that none before it has found: bool (N,)."""
    corner = np.minimum(boxes[:, None, 2:], truth_boxes[None, :, 2:])
    sides = np.clip(corner - np.maximum(boxes[:, None, :2], truth_boxes[None, :, :2]), 0, None)
    shared = sides.prod(2)
    areas, truth_areas = (np.clip(b[:, 2:] - b[:, :2], 0, None).prod(1) for b in (boxes, truth_boxes))
    overlap = shared / np.maximum(areas[:, None] + truth_areas[None] - shared, 1e-9)
    overlap[labels[:, None] != truth_labels[None]] = 0
    right = np.zeros(len(boxes), dtype=bool)
    for number in range(len(boxes) if len(truth_boxes) else 0):
        best = overlap[number].argmax()
        right[number] = overlap[number, best] >= iou
        if right[number]:
            overlap[:, best] = 0
    return right


def _ground_truth(record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """Boxes (N, 4) XYXY, classes (N,), and segmentations in COCO's format or None."""
    annotations = [a for a in record.get("annotations", []) if not a.get("iscrowd", 0)]
    boxes = [BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    labels = np.array([a["category_id"] for a in annotations], dtype=int)
    return np.array(boxes, dtype=float).reshape(-1, 4), labels, [a.get("segmentation") for a in annotations]


def tint(
    image: np.ndarray, size: tuple[int, int], masks: Sequence[Any], colors: Sequence[tuple[int, int, int]]
) -> np.ndarray:
    """A copy of `image` with masks, given for an image of another (height, width); the best are on top."""
    image = image.copy()
    for mask, color in reversed(list(zip(masks, colors))):
        if mask is not None and len(mask):
            resized = cv2.resize(bitmap(mask, *size), image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
            inside = resized > 0
            image[inside] = ((1 - MASK_OPACITY) * image[inside] + MASK_OPACITY * np.array(color)).astype(np.uint8)
    return image


def bitmap(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Polygons, an RLE, compressed or not, or a bitmap, as uint8 (height, width)."""
    if isinstance(segmentation, np.ndarray):
        return segmentation.astype(np.uint8)
    if isinstance(segmentation, list):
        return mask_util.decode(mask_util.merge(mask_util.frPyObjects(segmentation, height, width)))
    if isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, height, width)
    return mask_util.decode(segmentation)


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    texts: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
    size: float = 1.0,
) -> np.ndarray:
    """A copy of `image` with boxes in its own pixels; the best, which come first, are drawn on top.

    `size` is that of lines and letters: 1 is for images of some hundred pixels.
    """
    image = image.copy()
    line, space = max(1, round(2 * size)), max(1, round(3 * size))
    for (x0, y0, x1, y1), text, color in reversed(list(zip(np.rint(boxes).astype(int), texts, colors))):
        cv2.rectangle(image, (x0, y0), (x1, y1), (0, 0, 0), 2 * line)
        cv2.rectangle(image, (x0, y0), (x1, y1), color, line)
        (width, height), _ = cv2.getTextSize(text, FONT, 0.5 * size, max(1, round(size)))
        left = int(np.clip(x0, 0, max(image.shape[1] - width - 2 * space, 0)))
        bottom = int(np.clip(y0, height + 8 * size, image.shape[0]))
        top = bottom - height - round(8 * size)
        cv2.rectangle(image, (left, top), (left + width + 2 * space, bottom), color, -1)
        place = left + space, bottom - round(4 * size)
        cv2.putText(image, text, place, FONT, 0.5 * size, ink(color), max(1, round(size)), cv2.LINE_AA)
    return image


def ink(color: Sequence[float]) -> tuple[int, int, int]:
    """Black or white (BGR): what can be read on a color."""
    blue, green, red = color
    return (0, 0, 0) if 0.114 * blue + 0.587 * green + 0.299 * red > 100 else (255, 255, 255)


def resize(image: np.ndarray, scale: float) -> np.ndarray:
    """An image of another size; pixels stay sharp where it grows."""
    size = tuple(max(1, round(side * scale)) for side in image.shape[1::-1])
    return cv2.resize(image, size, interpolation=cv2.INTER_NEAREST if scale > 1 else cv2.INTER_AREA)


def pad_tile(image: np.ndarray) -> np.ndarray:
    """Puts an image of at most TILE x TILE pixels on a white tile with a gap around it."""
    bottom, right = TILE + GAP - image.shape[0], TILE + GAP - image.shape[1]
    return cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def header(titles: Sequence[str]) -> np.ndarray:
    """The titles of columns of tiles, above them."""
    image = np.full((HEADER, len(titles) * (TILE + GAP), 3), 255, np.uint8)
    for column, title in enumerate(titles):
        width = cv2.getTextSize(title, FONT, 0.8, 2)[0][0]
        size = 0.8 * min(1, (TILE - 10) / max(width, 1))
        cv2.putText(image, title, (column * (TILE + GAP) + 4, HEADER - 14), FONT, size, (0, 0, 0), 2, cv2.LINE_AA)
    return image
