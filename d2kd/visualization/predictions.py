"""What one model predicts for one image, drawn over it: boxes, masks and points, a label map, or its best classes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from .classifications import printable
from .detections import FONT, draw_boxes, ink, resize, tint
from .label_maps import class_colors, colored, legend
from .matching import bitmap
from .points import draw_points

#: Images with a smaller largest side are enlarged, by a whole factor, so that letters find room.
SMALLEST = 480
#: Largest side in pixels for which lines and letters have their usual size.
USUAL = 800
_LINE = 24


def prediction_picture(
    image: np.ndarray,
    class_names: Mapping[str, Sequence[str]],
    *,
    detections: Sequence[Mapping[str, Any]] | None = None,
    labels: np.ndarray | None = None,
    classes: Sequence[tuple[int, float]] | None = None,
    threshold: float = 0.0,
    colors: Sequence[Sequence[int]] | None = None,
    whole_legend: bool = False,
) -> np.ndarray:
    """Draws what is given; of several things, detections over the label map.

    Every class has a color of its own. Names in other letters than OpenCV can draw become numbers.

    Args:
        image: uint8 (H, W, 3) BGR.
        class_names: "thing_classes" of detections and best classes, "stuff_classes" of label maps.
        detections: in COCO's result format, with the model's class as `category_id`.
        labels: class of every pixel, int (H, W); the classes that occur are named below the picture.
        classes: (class, score), best first; written below the picture.
        threshold: detections with a lower score are left out.
        colors: RGB of each class of label maps; by default well apart.
        whole_legend: name all classes, so that the frames of a video have one size.

    Returns:
        uint8 (H', W', 3) BGR; without text below, the image's size times a whole factor.
    """
    scale = max(1, math.ceil(SMALLEST / max(image.shape[:2])))
    size = max(0.8, max(image.shape[:2]) * scale / USUAL)
    things, stuff = (_printable(class_names.get(kind, ())) for kind in ("thing_classes", "stuff_classes"))
    palette = class_colors(len(stuff)) if colors is None else np.asarray(colors, np.uint8)[:, ::-1]
    picture = resize(image, scale)
    if labels is not None:
        enlarged = cv2.resize(labels.astype(np.int32), picture.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        picture = colored(picture, enlarged, palette)
    if detections is not None:
        shown = [d for d in detections if d["score"] >= threshold]
        picture = _with_detections(picture, image.shape[:2], shown, things, scale, size)
    if labels is not None:
        wanted = list(range(len(stuff))) if whole_legend else [i for i in np.unique(labels) if 0 <= i < len(stuff)]
        picture = with_legend(picture, [stuff[i] for i in wanted], palette[wanted], size)
    if classes is not None:
        picture = _above(picture, _best(classes, things, _width(picture, size)), size)
    return picture


def with_legend(picture: np.ndarray, names: Sequence[str], palette: np.ndarray, size: float) -> np.ndarray:
    """The picture over names of classes with their colors (BGR), in letters of that size."""
    return _above(picture, legend(names, palette, _width(picture, size)), size)


def _with_detections(
    picture: np.ndarray,
    shape: tuple[int, ...],
    detections: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    scale: int,
    size: float,
) -> np.ndarray:
    detections = sorted(detections, key=lambda d: -d["score"])
    palette = class_colors(len(names) + 1)[1:]
    colors = [_color(palette, d["category_id"]) for d in detections]
    boxes = np.array([d["bbox"] for d in detections], dtype=float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = [d.get("segmentation") for d in detections]
    picture = tint(picture, (shape[0], shape[1]), masks, colors)
    for mask, color in zip(masks, colors):
        if mask is not None:
            large = cv2.resize(bitmap(mask, shape[0], shape[1]), picture.shape[1::-1], interpolation=cv2.INTER_NEAREST)
            outlines, _ = cv2.findContours(large, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
            cv2.drawContours(picture, outlines, -1, color, max(1, round(size)), cv2.LINE_AA)
    texts = [f"{names[d['category_id']]} {d['score']:.2f}" for d in detections]
    picture = draw_boxes(picture, boxes * scale, texts, colors, size)
    for detection, color in reversed(list(zip(detections, colors))):
        draw_points(picture, np.reshape(detection.get("points", []), (-1, 2)) * scale, color, max(2, round(3 * size)))
    return picture


def _best(classes: Sequence[tuple[int, float]], names: Sequence[str], width: int) -> np.ndarray:
    """The best classes with bars as long as their scores."""
    image = np.full((_LINE * max(len(classes), 1), width, 3), 255, np.uint8)
    palette = class_colors(len(names) + 1)[1:]
    for place, (label, score) in enumerate(classes):
        color = _color(palette, label)
        base, end = place * _LINE, round(min(max(score, 0.0), 1.0) * width)
        cv2.rectangle(image, (0, base + 2), (end, base + _LINE - 2), color, -1)
        text = f"{names[label]} {score:.2f}"
        length = cv2.getTextSize(text, FONT, 0.5, 1)[0][0] + 10
        cv2.putText(image, text, (5, base + 17), FONT, 0.5, ink(color) if length < end else (0, 0, 0), 1, cv2.LINE_AA)
    return image


def _color(palette: np.ndarray, number: int) -> tuple[int, int, int]:
    blue, green, red = map(int, palette[number % len(palette)])
    return blue, green, red


def _width(picture: np.ndarray, size: float) -> int:
    return max(1, round(picture.shape[1] / size))


def _above(picture: np.ndarray, below: np.ndarray, size: float) -> np.ndarray:
    """The picture over a strip of text, which is enlarged as lines and letters are."""
    height = max(1, round(below.shape[0] * size))
    return np.vstack([picture, cv2.resize(below, (picture.shape[1], height), interpolation=cv2.INTER_LINEAR)])


def _printable(names: Sequence[str]) -> list[str]:
    return [printable(name, f"class {number}") for number, name in enumerate(names)]
