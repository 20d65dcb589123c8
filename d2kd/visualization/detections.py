"""Ground truth and the detections of several models, boxes and masks, side by side on the same images."""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from d2kd.visualization.classifications import printable
from d2kd.visualization.matching import Objects, bitmap, detected, judge, match, objects_of
from d2kd.visualization.points import draw_points
from d2kd.visualization.prediction_files import is_box, is_id, is_number, is_points, is_rle, is_whole, read_entries
from detectron2.data import detection_utils

TILE = 384  # width of a tile in pixels
HIGHEST = 1.5  # tiles of upright images are at most so much higher than wide
HEADER = 44
LEGEND = 30
GAP = 6
TRUTH, RIGHT, WRONG = (255, 255, 255), (80, 200, 60), (60, 60, 235)  # BGR
MASK_OPACITY = 0.45
FONT = cv2.FONT_HERSHEY_SIMPLEX


def detection_grid(
    dataset_dicts: Sequence[dict[str, Any]],
    class_names: Sequence[str],
    predictions: Mapping[str, Mapping[Any, list[dict[str, Any]]]],
    score_threshold: float = 0.3,
    *,
    by_masks: bool = False,
) -> np.ndarray:
    """Draws one row per image: the ground truth, then each model's detections, with class and score.

    A detection is green if its class is right and its IoU with an object that no better one has taken is at least
    0.5, and red otherwise; objects that no detection finds are dashed. Masks and points are drawn where a model
    predicts some. Tiles have the proportion of their image, and classes are written where there is room.

    Args:
        dataset_dicts: the images, in Detectron2's format.
        class_names: by contiguous class id.
        predictions: the result of `read_predictions` by the heading of the model's column.
        score_threshold: detections below it are left out.
        by_masks: the IoU is that of masks, where there are some.

    Returns:
        uint8 (H, W, 3) BGR.
    """
    class_names = [printable(name, f"class {number}") for number, name in enumerate(class_names)]
    rows = [header(["ground truth", *(printable(title, "model") for title in predictions)])]
    # segmentations of data for models without masks may be anything
    draws_masks = any(p.get("mask") for images in predictions.values() for found in images.values() for p in found)
    for record in dataset_dicts:
        image = detection_utils.read_image(record["file_name"], format="BGR")
        size = image.shape[:2]
        scale = tile_scale(*size)
        enlarged = resize(image, scale)
        truth = objects_of(record)
        texts = [class_names[label] for label in truth.labels]
        tinted = tint(enlarged, size, truth.masks if draws_masks else [], [TRUTH] * len(texts))
        tiles = [draw_boxes(tinted, truth.boxes * scale, texts, [TRUTH] * len(texts))]
        for by_image in predictions.values():
            found, finds = judge(
                by_image.get(record["image_id"], []), record, score_threshold, size if by_masks else None
            )
            objects = detected(found)
            texts = [f"{class_names[p['label']]} {p['score']:.2f}" for p in found]
            colors = [RIGHT if place >= 0 else WRONG for place in finds]
            tinted = tint(enlarged, size, objects.masks, colors)
            for detection, color in reversed(list(zip(found, colors))):  # the best on top
                draw_points(tinted, np.reshape(detection.get("points", []), (-1, 2)) * scale, color)
            tile = draw_boxes(tinted, objects.boxes * scale, [], colors)
            missed = np.setdiff1d(np.arange(len(truth.boxes)), finds)
            tile = draw_dashed(tile, truth.boxes[missed] * scale, TRUTH)
            tiles.append(draw_texts(tile, objects.boxes * scale, texts, colors))
        rows.append(np.hstack([pad_tile(tile, len(enlarged)) for tile in tiles]))
    return np.vstack([*rows, _legend(rows[0].shape[1])])


def read_results(path: str) -> list[dict[str, Any]]:
    """Reads COCO's result format (coco_instances_results.json).

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or of another format; the message says where.
    """
    required = {"image_id": is_id, "category_id": is_whole, "bbox": is_box, "score": is_number}
    return read_entries(path, required, {"segmentation": is_rle, "points": is_points})


def read_predictions(path: str, metadata: Any) -> dict[Any, list[dict[str, Any]]]:
    """Reads COCO's result format (coco_instances_results.json).

    Args:
        path: the file.
        metadata: of the dataset; maps category ids to contiguous class ids.

    Returns:
        By image id, a list of `{"box": XYXY, "label": contiguous class id, "score", "mask": RLE or None}`, with the
        "points" [[x, y], ...] of models that have written them.

    Raises:
        OSError, ValueError: see `read_results`; or the dataset has no such category.
    """
    to_contiguous, classes = (metadata.get(f"thing_{key}") for key in ("dataset_id_to_contiguous_id", "classes"))
    by_image: dict[Any, list[dict[str, Any]]] = {}
    for number, result in enumerate(read_results(path)):
        x, y, width, height = result["bbox"]
        category = result["category_id"]
        label = category if to_contiguous is None else to_contiguous.get(category)
        if label is None or (classes is not None and not 0 <= label < len(classes)):
            raise ValueError(f"entry {number} is of category {category}, which the dataset does not have")
        item = {"box": [x, y, x + width, y + height], "label": label, "score": result["score"]}
        if result.get("points") is not None:
            item["points"] = result["points"]
        item["mask"] = result.get("segmentation")
        by_image.setdefault(result["image_id"], []).append(item)
    return by_image


def is_right(boxes: np.ndarray, labels: np.ndarray, truth_boxes: np.ndarray, truth_labels: np.ndarray) -> np.ndarray:
    """Whether each detection, best first, finds an object of its class that none before it has found: bool (N,)."""
    return match(Objects(boxes, labels, []), Objects(truth_boxes, truth_labels, [])) >= 0


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


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    texts: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
    size: float = 1.0,
) -> np.ndarray:
    """A copy of `image` with boxes in its own pixels; the best, which come first, are drawn on top.

    A text stands above its box, else within it at the top or below it, where it covers no text of a better one;
    without room it is left out. `size` is that of lines and letters: 1 is for images of some hundred pixels.
    """
    image = image.copy()
    line = max(1, round(2 * size))
    corners = np.rint(boxes).astype(int)
    for (x0, y0, x1, y1), color in reversed(list(zip(corners, colors))):
        cv2.rectangle(image, (x0, y0), (x1, y1), (0, 0, 0), 2 * line)
        cv2.rectangle(image, (x0, y0), (x1, y1), color, line)
    return draw_texts(image, boxes, texts, colors, size)


def draw_texts(
    image: np.ndarray,
    boxes: np.ndarray,
    texts: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
    size: float = 1.0,
) -> np.ndarray:
    """A copy of `image` with the texts of `draw_boxes`, without the boxes."""
    image = image.copy()
    space = max(1, round(3 * size))
    taken: list[tuple[int, int, int, int]] = []
    for box, text, color in zip(np.rint(boxes).astype(int), texts, colors):
        (width, height), _ = cv2.getTextSize(text, FONT, 0.5 * size, max(1, round(size)))
        place = _free_place(box, width + 2 * space, height + round(8 * size), image.shape[1::-1], taken)
        if place is None:
            continue
        taken.append(place)
        left, top, right, bottom = place
        cv2.rectangle(image, (left, top), (right, bottom), color, -1)
        base = left + space, bottom - round(4 * size)
        cv2.putText(image, text, base, FONT, 0.5 * size, ink(color), max(1, round(size)), cv2.LINE_AA)
    return image


def _free_place(
    box: np.ndarray, width: int, height: int, size: tuple[int, int], taken: Sequence[tuple[int, int, int, int]]
) -> tuple[int, int, int, int] | None:
    """Where a text of that size covers no other: left, top, right and bottom; None without room."""
    x0, y0, _, y1 = box.tolist()
    left = int(np.clip(x0, 0, max(size[0] - width, 0)))
    tops = [top for top in (y0 - height, y0, y1) if 0 <= top <= size[1] - height]
    for top in tops or [max(0, size[1] - height)]:
        place = (left, top, left + width, top + height)
        if not any(_overlap(place, other) for other in taken):
            return place
    return None


def _overlap(one: Sequence[int], other: Sequence[int]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def draw_dashed(image: np.ndarray, boxes: np.ndarray, color: tuple[int, int, int], dash: int = 8) -> np.ndarray:
    """A copy of `image` with dashed boxes in its own pixels, dark between the dashes."""
    image = image.copy()
    for x0, y0, x1, y1 in np.rint(boxes).astype(int).tolist():
        cv2.rectangle(image, (x0, y0), (x1, y1), (0, 0, 0), 2)
        for start in range(x0, x1, 2 * dash):
            for y in (y0, y1):
                cv2.line(image, (start, y), (min(start + dash, x1), y), color, 2)
        for start in range(y0, y1, 2 * dash):
            for x in (x0, x1):
                cv2.line(image, (x, start), (x, min(start + dash, y1)), color, 2)
    return image


def ink(color: Sequence[float]) -> tuple[int, int, int]:
    """Black or white (BGR): what can be read on a color."""
    blue, green, red = color
    return (0, 0, 0) if 0.114 * blue + 0.587 * green + 0.299 * red > 100 else (255, 255, 255)


def resize(image: np.ndarray, scale: float) -> np.ndarray:
    """An image of another size; pixels stay sharp where it grows."""
    size = tuple(max(1, round(side * scale)) for side in image.shape[1::-1])
    return cv2.resize(image, size, interpolation=cv2.INTER_NEAREST if scale > 1 else cv2.INTER_AREA)


def tile_scale(height: int, width: int) -> float:
    """What makes an image as wide as a tile, or as high as the highest one."""
    return min(TILE / width, HIGHEST * TILE / height)


def pad_tile(image: np.ndarray, height: int = TILE) -> np.ndarray:
    """Puts an image of at most TILE pixels in width on a white tile of a height, with a gap around it."""
    bottom, right = height + GAP - image.shape[0], TILE + GAP - image.shape[1]
    return cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def _legend(width: int) -> np.ndarray:
    """The line that says what the colors of a grid of detections mean."""
    image = np.full((LEGEND, width, 3), 255, np.uint8)
    x = 4
    for text, color in (("found", RIGHT), ("wrong", WRONG), ("missed", None)):
        box = np.array([[x + 1, 8, x + 29, LEGEND - 8]], float)
        image = draw_boxes(image, box, [], [color]) if color else draw_dashed(image, box, TRUTH, 4)
        cv2.putText(image, text, (x + 38, LEGEND - 9), FONT, 0.55, (0, 0, 0), 1, cv2.LINE_AA)
        x += 62 + cv2.getTextSize(text, FONT, 0.55, 1)[0][0]
    return image


def header(titles: Sequence[str]) -> np.ndarray:
    """The titles of columns of tiles, above them."""
    image = np.full((HEADER, len(titles) * (TILE + GAP), 3), 255, np.uint8)
    for column, title in enumerate(titles):
        width = cv2.getTextSize(title, FONT, 0.8, 2)[0][0]
        size = 0.8 * min(1, (TILE - 10) / max(width, 1))
        cv2.putText(image, title, (column * (TILE + GAP) + 4, HEADER - 14), FONT, size, (0, 0, 0), 2, cv2.LINE_AA)
    return image
