"""What receptive tokens look at: their masks over an image, one row per feature level."""

from collections.abc import Mapping
from typing import NamedTuple

import cv2
import numpy as np

TILE = 160  # width of a tile in pixels
HEADER = 22
GAP = 4
FONT = cv2.FONT_HERSHEY_SIMPLEX


class MaskRow(NamedTuple):
    """The masks of one level over one image.

    `masks` is float (T, H, W) with values in [0, 1], `gate` (H, W) what the level's map is multiplied with, and
    `stride` the pixels of the network's input per cell; a mask may reach beyond the image, into its padding.
    """

    masks: np.ndarray
    gate: np.ndarray
    stride: float


def mask_picture(image: np.ndarray, rows: Mapping[str, MaskRow]) -> np.ndarray:
    """Draws one row per level: the image, the mask of each token over it, and the gate.

    Dark blue is 0, yellow is 1 (for the gate: its largest value). Below each tile stand the smallest and the largest
    value.

    Args:
        image: what the network saw, uint8 (H, W, 3) BGR.
        rows: by the name of the level.

    Returns:
        uint8 (H, W, 3) BGR.
    """
    scale = TILE / image.shape[1]
    height = max(1, round(image.shape[0] * scale))
    small = cv2.resize(image, (TILE, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    drawn = []
    for name, row in rows.items():
        tiles = [_titled(small, name)]
        for number, mask in enumerate(row.masks):
            tiles.append(
                _titled(_overlay(small, _spread(mask, row.stride, image.shape)), _label(f"{number + 1}", mask))
            )
        gate = row.gate / max(float(row.gate.max()), 1e-12)
        tiles.append(_titled(_overlay(small, _spread(gate, row.stride, image.shape)), _label("gate", row.gate)))
        drawn.append(np.hstack(tiles))
    width = max(row.shape[1] for row in drawn)
    padded = [cv2.copyMakeBorder(r, 0, 0, 0, width - r.shape[1], cv2.BORDER_CONSTANT, value=(255,) * 3) for r in drawn]
    return np.vstack(padded)


def _label(name: str, values: np.ndarray) -> str:
    return f"{name}: {values.min():.2f} - {values.max():.2f}"


def _spread(mask: np.ndarray, stride: float, shape: tuple[int, ...]) -> np.ndarray:
    """A mask in the pixels of its image: enlarged by its stride, without what lies in the padding."""
    size = tuple(max(1, round(side * stride)) for side in mask.shape[::-1])
    large = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    large = large[: shape[0], : shape[1]]
    missing = shape[0] - large.shape[0], shape[1] - large.shape[1]
    return cv2.copyMakeBorder(large, 0, missing[0], 0, missing[1], cv2.BORDER_REPLICATE) if any(missing) else large


def _overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    values = cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_AREA)
    heat = cv2.applyColorMap((values.clip(0, 1) * 255).astype(np.uint8), cv2.COLORMAP_PLASMA)
    gray = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    return cv2.addWeighted(gray, 0.4, heat, 0.6, 0)


def _titled(tile: np.ndarray, text: str) -> np.ndarray:
    """The tile with a line of text below it and a gap around."""
    padded = cv2.copyMakeBorder(tile, GAP, HEADER, GAP, GAP, cv2.BORDER_CONSTANT, value=(255, 255, 255))
    cv2.putText(padded, text, (GAP, padded.shape[0] - 7), FONT, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
    return padded
