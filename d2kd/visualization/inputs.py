"""What a model is trained on: images as augmentations leave them, with boxes, masks, label maps and classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from detectron2.structures import BitMasks

from .classifications import printable
from .detections import TILE, draw_boxes, header, pad_tile, resize, tint
from .label_maps import class_colors, colored, legend

#: Tiles of a row.
COLUMNS = 4


def input_sheet(
    inputs: Sequence[dict[str, Any]], channels: str, thing_classes: Sequence[str], stuff_classes: Sequence[str] = ()
) -> np.ndarray:
    """Draws the inputs of a model, each under its file's name, or its class, and its size in pixels.

    Args:
        inputs: what a training loader gives: "image", (C, H, W) in 0..255, and "instances", "sem_seg", "label" or
            "target" (shares of the classes, (K,)).
        channels: of images, as INPUT.FORMAT says.
        thing_classes: names of the classes of instances or whole images.
        stuff_classes: names of the classes of pixels.

    Returns:
        uint8 (H, W, 3) BGR.
    """
    things = [printable(name, f"class {number}") for number, name in enumerate(thing_classes)]
    stuff = [printable(name, f"class {number}") for number, name in enumerate(stuff_classes)]
    palette = class_colors(len(stuff))
    tiles = [_tile(x, channels, things, palette) for x in inputs]
    captions = [_caption(x, things) for x in inputs]
    columns = min(COLUMNS, max(len(tiles), 1))
    blank = np.full((1, 1, 3), 255, np.uint8)
    rows = []
    for start in range(0, len(tiles), columns):
        row, texts = tiles[start : start + columns], captions[start : start + columns]
        missing = columns - len(row)
        rows += [header([*texts, *[""] * missing]), np.hstack([pad_tile(t) for t in [*row, *[blank] * missing]])]
    if stuff:
        rows.append(legend(stuff, palette, rows[0].shape[1]))
    return np.vstack(rows)


def _tile(x: dict[str, Any], channels: str, names: Sequence[str], palette: np.ndarray) -> np.ndarray:
    image = network_image(x["image"].numpy(), channels)
    if len(palette) and "sem_seg" in x:
        image = colored(image, x["sem_seg"].numpy(), palette)
    scale = TILE / max(image.shape[:2])
    tile = resize(image, scale)
    if "instances" not in x:
        return tile
    found = x["instances"]
    labels = found.gt_classes.tolist()
    # the first color, that of background among pixels, is left out
    colors = [(int(b), int(g), int(r)) for b, g, r in class_colors(len(names) + 1)[1:][labels]]
    if found.has("gt_masks"):
        tile = tint(tile, image.shape[:2], _segmentations(found.gt_masks), colors)
    return draw_boxes(tile, found.gt_boxes.tensor.numpy() * scale, [names[label] for label in labels], colors)


def network_image(image: np.ndarray, channels: str) -> np.ndarray:
    """What a network sees as a picture, uint8 (H, W, 3) BGR.

    Args:
        image: (C, H, W) in 0..255.
        channels: as INPUT.FORMAT says.
    """
    pixels = np.clip(np.rint(image.transpose(1, 2, 0).astype(np.float32)), 0, 255).astype(np.uint8)
    if pixels.shape[2] == 1:
        return cv2.cvtColor(pixels, cv2.COLOR_GRAY2BGR)
    return np.ascontiguousarray(pixels[:, :, ::-1] if channels == "RGB" else pixels)


def _segmentations(masks: Any) -> list[Any]:
    if isinstance(masks, BitMasks):
        return [mask.numpy() for mask in masks.tensor]
    return [[polygon.tolist() for polygon in polygons] for polygons in masks.polygons]


def _caption(x: dict[str, Any], names: Sequence[str]) -> str:
    height, width = x["image"].shape[1:]
    if "target" in x:
        shares, labels = x["target"].topk(min(2, len(names)))
        text = " + ".join(f"{names[k]} {s:.2f}" for s, k in zip(shares.tolist(), labels.tolist()) if s >= 0.01)
    else:
        text = names[x["label"]] if "label" in x else printable(Path(x.get("file_name", "image")).name)
    return f"{text}, {width} x {height}"
