"""Feature maps of a teacher and its student over one image: how active, of which kind, and how far apart."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .detections import resize

#: Side of a tile of a square image (others have its area), and smallest width of the place for one, in pixels.
TILE, PLACE = 150, 104
_GAP, _GROUP = 8, 24
_MARGIN, _DPI = 16, 100
#: Smallest width of a picture, for its texts.
_WIDTH = 900
#: Width for the heading of the last columns.
_LAST = 210
_HEADER, _TITLE, _CAPTION, _LINE = 54, 40, 22, 19
_BAR = (200, 14)
#: Colors of the mean (below 0, 0, above 0) and of the difference (0 is black).
MEAN_COLORS, DIFFERENCE_COLORS = "RdBu_r", "inferno"
_INK, _GREY = "#111111", "#555555"


class FeatureRow(NamedTuple):
    """The maps of one tap over an image.

    Attributes:
        title: of the tap.
        about: a second line on it.
        stride: pixels of the image per cell; maps start at its upper left corner and may reach beyond it.
        means: (H, W), by column ("teacher", "student after", ...).
        end: of the scale of means, which goes from -`end` to `end`.
        colors: (H, W, 3) RGB in [0, 1], of the same columns.
        differences: (H, W), of the students' columns.
        captions: below the differences, by column.
    """

    title: str
    about: str
    stride: float
    means: Mapping[str, np.ndarray]
    end: float
    colors: Mapping[str, np.ndarray]
    differences: Mapping[str, np.ndarray]
    captions: Mapping[str, str]


def feature_picture(
    image: np.ndarray, rows: Sequence[FeatureRow], end: float, heading: str = "", notes: Sequence[str] = ()
) -> np.ndarray:
    """Draws a row for each tap: the image, means, principal components and differences, with their scales below.

    Args:
        image: what the networks saw, uint8 (H, W, 3) BGR.
        rows: with the same columns each.
        end: of the scale of differences, which starts at 0.
        heading: above all.
        notes: sentences below.

    Returns:
        uint8 (H', W', 3) BGR.
    """
    return _Picture(image, rows, end, heading, notes).draw()


class _Text(NamedTuple):
    x: float
    y: float
    text: str
    size: float = 9.5
    color: str = _INK
    weight: str = "normal"
    align: str = "left"


class _Picture:
    """Tiles on a white sheet, pixel by pixel, and the texts that go with them."""

    def __init__(
        self, image: np.ndarray, rows: Sequence[FeatureRow], end: float, heading: str, notes: Sequence[str]
    ) -> None:
        self.image, self.rows, self.end = image, rows, end
        height, width = image.shape[:2]
        self.zoom = min(TILE / (height * width) ** 0.5, 2 * TILE / max(height, width))
        self.size = max(1, round(image.shape[0] * self.zoom)), max(1, round(image.shape[1] * self.zoom))
        self.place = max(self.size[1], PLACE)
        columns, students = list(rows[0].means), list(rows[0].differences)
        #: group, column and left edge of each tile
        self.slots: list[tuple[str, str, int]] = []
        x = _MARGIN
        for group, names in (("image", [""]), ("mean", columns), ("colors", columns), ("difference", students)):
            for name in names:
                self.slots.append((group, name, x))
                x += self.place + _GAP
            x += _GROUP - _GAP
        self.width = max(x - _GROUP + _MARGIN, self.slots[-len(students)][2] + _LAST, _WIDTH)
        self.texts: list[_Text] = []
        self.heading, self.notes = heading, notes

    def draw(self) -> np.ndarray:
        top = _HEADER + (26 if self.heading else 0)
        row_height = _TITLE + self.size[0] + _CAPTION
        legend_top = top + len(self.rows) * row_height + 6
        legend, height = self._legend(legend_top)
        sheet = np.full((height, self.width, 3), 255, np.uint8)  # RGB
        if self.heading:
            self.texts.append(_Text(_MARGIN, 22, self.heading, 12, weight="bold"))
        self._headings(top)
        for number, row in enumerate(self.rows):
            self._row(sheet, row, top + number * row_height)
        for x, y, bar in legend:
            sheet[y : y + bar.shape[0], x : x + bar.shape[1]] = bar
        return self._with_texts(sheet)

    def _headings(self, top: int) -> None:
        titles = {
            "image": "image",
            "mean": "mean over the channels",
            "colors": "principal components as colors",
            "difference": "difference to the teacher",
        }
        seen: set[str] = set()
        for group, name, x in self.slots:
            if group not in seen:
                self.texts.append(_Text(x, top - 30, titles[group], 10.5, weight="bold"))
                seen.add(group)
            self.texts.append(_Text(x, top - 12, name, 9.5, _GREY))

    def _row(self, sheet: np.ndarray, row: FeatureRow, top: int) -> None:
        self.texts.append(_Text(_MARGIN, top + 16, row.title, 10.5, weight="bold"))
        self.texts.append(_Text(_MARGIN, top + 32, row.about, 9, _GREY))
        for group, name, x in self.slots:
            tile = self._tile(group, name, row)
            y = top + _TITLE
            sheet[y : y + tile.shape[0], x : x + tile.shape[1]] = tile
            caption = row.captions.get(name, "") if group == "difference" else ""
            if group == "mean" and name == next(iter(row.means)):
                caption = f"-{row.end:.2g} (blue) to +{row.end:.2g} (red)"
            self.texts.append(_Text(x, y + self.size[0] + 15, caption, 8.5, _GREY))

    def _tile(self, group: str, name: str, row: FeatureRow) -> np.ndarray:
        """uint8 (h, w, 3) RGB."""
        if group == "image":
            return resize(self.image, self.zoom)[:, :, ::-1]
        if group == "colors":
            values = np.rint(row.colors[name] * 255).astype(np.uint8)
        elif group == "mean":
            values = tinted((row.means[name] / row.end + 1) / 2, MEAN_COLORS)
        else:
            values = tinted(row.differences[name] / self.end, DIFFERENCE_COLORS)
        return self._spread(values, row.stride)

    def _spread(self, values: np.ndarray, stride: float) -> np.ndarray:
        """A map in the pixels of its tile: each cell a square, without what lies beyond the image."""
        rows, columns = (
            ((np.arange(pixels) + 0.5) / self.zoom / stride).astype(int).clip(max=cells - 1)
            for pixels, cells in zip(self.size, values.shape)
        )
        return values[rows[:, None], columns[None]]

    def _legend(self, top: int) -> tuple[list[tuple[int, int, np.ndarray]], int]:
        """Bars of the scales with their place, and the height of the sheet."""
        ramp = np.broadcast_to(np.linspace(0, 1, _BAR[0]), (_BAR[1], _BAR[0]))
        bars, y = [], top + 8
        entries = [
            (
                tinted(ramp, MEAN_COLORS),
                ("less", "more"),
                "mean over the channels, each brought to mean 0 and deviation 1 over all images shown: red is more "
                "active than usual; ends of the scale, one for all maps of a tap, stand below the teacher's",
            ),
            (
                None,
                ("", ""),
                "principal components: red, green and blue are the three directions in which the features vary most, "
                "the same for teacher and student: equal colors are equal features, whatever the color",
            ),
            (
                tinted(ramp, DIFFERENCE_COLORS),
                ("0", f"{self.end:.2g}"),
                "difference: root mean square over the standardized channels; 0 (black) is equal, 1.4 unrelated; one "
                "scale for all maps and pictures",
            ),
        ]
        left = _MARGIN + 36
        for bar, ends, text in entries:
            swatch = bar if bar is not None else _color_bar()
            bars.append((left, y, swatch))
            self.texts.append(_Text(left - 5, y + 11, ends[0], 8.5, align="right"))
            self.texts.append(_Text(left + _BAR[0] + 5, y + 11, ends[1], 8.5))
            y = self._wrapped(text, left + _BAR[0] + 44, y + 11, 9) + 8
        for note in self.notes:
            y = self._wrapped(note, _MARGIN, y + 12, 9) + 2
        return bars, y + 8

    def _wrapped(self, text: str, x: int, y: int, size: float) -> int:
        """Adds lines from a first base line on; returns where the next would begin."""
        letters = max(20, int((self.width - x - _MARGIN) / (0.62 * size * _DPI / 100 * 1.12)))
        for line in textwrap.wrap(text, letters):
            self.texts.append(_Text(x, y, line, size))
            y += _LINE
        return y - 11

    def _with_texts(self, sheet: np.ndarray) -> np.ndarray:
        height, width = sheet.shape[:2]
        figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
        canvas: Any = FigureCanvasAgg(figure)  # untyped
        figure.figimage(sheet, resize=False)
        for t in self.texts:
            figure.text(
                t.x / width,
                1 - t.y / height,
                t.text,
                fontsize=t.size * 72 / _DPI * 1.25,
                color=t.color,
                fontweight=t.weight,
                ha=t.align,
                va="baseline",
                parse_math=False,
            )
        canvas.draw()
        drawn = np.asarray(canvas.buffer_rgba())[:height, :width, :3]
        return cv2.cvtColor(np.ascontiguousarray(drawn), cv2.COLOR_RGB2BGR)


def tinted(values: np.ndarray, colors: str) -> np.ndarray:
    """Returns numbers from 0 to 1 in the colors of a scale of matplotlib, uint8 (..., 3) RGB; others take its ends."""
    return np.asarray(matplotlib.colormaps[colors](values.clip(0, 1), bytes=True))[..., :3]


def _color_bar() -> np.ndarray:
    """A bar that shows the three colors and their mixtures."""
    across = np.linspace(0, 360, _BAR[0], endpoint=False)
    hsv = np.stack([across, np.full_like(across, 0.65), np.full_like(across, 0.9)], axis=-1)[None].astype(np.float32)
    rgb = np.rint(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * 255).astype(np.uint8)
    return np.broadcast_to(rgb, (_BAR[1], _BAR[0], 3))
