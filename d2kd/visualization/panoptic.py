"""A merged map of things and stuff, drawn over its image."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from .classifications import printable
from .detections import FONT, ink, resize
from .label_maps import class_colors, colored
from .predictions import SMALLEST, USUAL, with_legend

_OUTLINE = (255, 255, 255)


def panoptic_picture(
    image: np.ndarray,
    ids: np.ndarray,
    segments: Sequence[Mapping[str, Any]],
    class_names: Mapping[str, Sequence[str]],
    *,
    colors: Sequence[Sequence[int]] | None = None,
    whole_legend: bool = False,
) -> np.ndarray:
    """Draws every segment in the color of its class; things have an outline and their name, stuff is named below.

    Args:
        image: uint8 (H, W, 3) BGR.
        ids: of the segment of every pixel, int (H, W); pixels of none are left as they are.
        segments: for each `id`, `isthing`, `category_id` and perhaps `score`.
        class_names: "thing_classes" and "stuff_classes".
        colors: RGB of each class of stuff; by default well apart.
        whole_legend: name all stuff, so that the frames of a video have one size.

    Returns:
        uint8 (H', W', 3) BGR.
    """
    scale = max(1, math.ceil(SMALLEST / max(image.shape[:2])))
    size = max(0.8, max(image.shape[:2]) * scale / USUAL)
    things, stuff = (
        [printable(name, f"class {number}") for number, name in enumerate(class_names.get(kind, ()))]
        for kind in ("thing_classes", "stuff_classes")
    )
    of_stuff = class_colors(len(stuff)) if colors is None else np.asarray(colors, np.uint8)[:, ::-1]
    of_things = class_colors(1 + len(stuff) + len(things))[1 + len(stuff) :]  # behind those of stuff
    palette = np.array(
        [(of_things if s["isthing"] else of_stuff)[s["category_id"]] for s in segments], np.uint8
    ).reshape(-1, 3)
    places = np.full(int(max(ids.max(initial=0), *(s["id"] for s in segments), 0)) + 1, -1, np.int32)
    for place, segment in enumerate(segments):
        places[segment["id"]] = place
    places[0] = -1
    picture = resize(image, scale)
    enlarged = cv2.resize(places[ids], picture.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    picture = colored(picture, enlarged, palette) if len(palette) else picture
    shown = [(place, s) for place, s in enumerate(segments) if s["isthing"]]
    for place, _ in shown:
        outlines, _ = cv2.findContours((enlarged == place).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(picture, outlines, -1, _OUTLINE, max(1, round(size)), cv2.LINE_AA)
    for place, segment in reversed(shown):  # the best on top
        text = things[segment["category_id"]] + (f" {segment['score']:.2f}" if "score" in segment else "")
        _name(picture, enlarged == place, text, palette[place], size)
    present = {s["category_id"] for s in segments if not s["isthing"]}
    wanted = list(range(len(stuff))) if whole_legend else sorted(present)
    return with_legend(picture, [stuff[i] for i in wanted], of_stuff[wanted], size) if wanted else picture


def _name(picture: np.ndarray, inside: np.ndarray, text: str, color: np.ndarray, size: float) -> None:
    """Writes a name into the widest part of a segment, in place."""
    if not inside.any():
        return
    depth = cv2.distanceTransform(np.pad(inside, 1).astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    line, space = max(1, round(size)), max(1, round(3 * size))
    (width, height), _ = cv2.getTextSize(text, FONT, 0.5 * size, line)
    left = int(np.clip(x - width // 2 - space, 0, max(picture.shape[1] - width - 2 * space, 0)))
    bottom = int(np.clip(y + height // 2 + space, height + 2 * space, picture.shape[0]))
    chip = tuple(map(int, color))
    cv2.rectangle(picture, (left, bottom - height - 2 * space), (left + width + 2 * space, bottom), chip, -1)
    cv2.putText(picture, text, (left + space, bottom - space), FONT, 0.5 * size, ink(chip), line, cv2.LINE_AA)
