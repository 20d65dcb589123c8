"""A masked teacher: the plot of its gate (drift and time by the share of patches), and the patches it computes."""

from collections.abc import Iterable, Mapping

import cv2
import numpy as np
from matplotlib.figure import Figure

from .curves import COLORS


def masking_plot(points: Iterable[tuple[str, float, float, float]], resized: float) -> Figure:
    """Draws the distance to the whole teacher's features, and the time, by selector.

    Args:
        points: (selector, share of the patches, cosine distance, time over that of the whole teacher).
        resized: the distance of the whole teacher's features on resized images, a line across.
    """
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    by_selector: dict[str, list[tuple[float, float, float]]] = {}
    for selector, *values in points:
        by_selector.setdefault(selector, []).append((values[0], values[1], values[2]))
    for color, (selector, rows) in zip(COLORS[1:], by_selector.items()):
        ratios, distances, times = zip(*sorted(rows))
        left.plot(ratios, distances, "o-", color=color, label=selector)
        right.plot(ratios, times, "o-", color=color, label=selector)
    left.axhline(resized, color=COLORS[0], linestyle="--", label="whole teacher, image resized by 10 %")
    left.set_ylabel("cosine distance to the whole teacher")
    right.plot([0, 1], [0, 1], color=COLORS[0], linestyle=":")
    right.set_ylabel("time / that of the whole teacher")
    for axes in (left, right):
        axes.set_xlabel("share of the patches")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    left.legend(fontsize="small")
    return figure


#: Sides of a picture of kept patches are enlarged to this many pixels, or shrunk.
TILE = 192
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_GAP, _LABEL = 4, 18


def kept_picture(image: np.ndarray, kept: np.ndarray, patch: int) -> np.ndarray:
    """Draws an image whose dropped patches are dark and gray.

    Args:
        image: uint8 (H, W, 3) BGR.
        kept: bool (rows, columns) of the grid of patches, from the upper left corner; it may reach beyond the image.
        patch: side of a patch in pixels of the image.

    Returns:
        uint8 (TILE, TILE, 3) BGR, white beyond the image.
    """
    scale = TILE / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    small = cv2.resize(image, size, interpolation=interpolation)
    rows = (np.arange(size[1]) / scale / patch).astype(int).clip(max=kept.shape[0] - 1)
    columns = (np.arange(size[0]) / scale / patch).astype(int).clip(max=kept.shape[1] - 1)
    gray = cv2.cvtColor(cv2.cvtColor(small, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR) // 4
    drawn = np.where(kept[rows[:, None], columns[None]][..., None], small, gray)
    white = (255, 255, 255)
    return cv2.copyMakeBorder(drawn, 0, TILE - size[1], 0, TILE - size[0], cv2.BORDER_CONSTANT, value=white)


def sheet(rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """Puts pictures of equal width below each other, with a line of text above each.

    Args:
        rows: uint8 (H, W, 3) BGR by their text.
    """
    drawn = []
    for text, row in rows.items():
        padded = cv2.copyMakeBorder(row, _LABEL, _GAP, 0, 0, cv2.BORDER_CONSTANT, value=(255, 255, 255))
        drawn.append(cv2.putText(padded, text, (_GAP, _LABEL - 5), _FONT, 0.42, (0, 0, 0), 1, cv2.LINE_AA))
    return np.vstack(drawn)
