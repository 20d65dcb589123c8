"""Feature maps of a teacher and its student over one image: how active, of which kind, and how far apart."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import cv2
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

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
#: Height of a line more of the heading, of a tap's title, and of the line on it.
_HEADING_LINE, _TITLE_LINE, _ABOUT_LINE = 20, 17, 15
#: Sizes of texts: heading, title of a tap, line on it, legend and notes.
_HEADING_SIZE, _TITLE_SIZE, _ABOUT_SIZE, _NOTE_SIZE = 12.0, 10.5, 9.0, 9.0
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
        heading = self._lines(self.heading, _HEADING_SIZE, "bold")
        top = _HEADER + (26 + _HEADING_LINE * (len(heading) - 1) if self.heading else 0)
        titles = [self._title(row) for row in self.rows]
        above = [_TITLE + _TITLE_LINE * (len(title) - 1) + _ABOUT_LINE * (len(about) - 1) for title, about in titles]
        legend_top = top + sum(above) + len(self.rows) * (self.size[0] + _CAPTION) + 6
        legend, height = self._legend(legend_top)
        sheet = np.full((height, self.width, 3), 255, np.uint8)  # RGB
        for number, line in enumerate(heading):
            self.texts.append(_Text(_MARGIN, 22 + number * _HEADING_LINE, line, _HEADING_SIZE, weight="bold"))
        self._headings(top)
        for row, title, height_of_title in zip(self.rows, titles, above):
            self._write_title(title, top)
            self._row(sheet, row, top + height_of_title)
            top += height_of_title + self.size[0] + _CAPTION
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

    def _lines(self, text: str, size: float, weight: str = "normal", x: int = _MARGIN) -> list[str]:
        """The lines of a text that goes from `x` to the right margin."""
        return wrapped(text, self.width - x - _MARGIN, size, weight)

    def _title(self, row: FeatureRow) -> tuple[list[str], list[str]]:
        return self._lines(row.title, _TITLE_SIZE, "bold"), self._lines(row.about, _ABOUT_SIZE)

    def _write_title(self, lines: tuple[list[str], list[str]], top: int) -> None:
        title, about = lines
        for number, line in enumerate(title):
            self.texts.append(_Text(_MARGIN, top + 16 + number * _TITLE_LINE, line, _TITLE_SIZE, weight="bold"))
        top += 32 + _TITLE_LINE * (len(title) - 1)
        for number, line in enumerate(about):
            self.texts.append(_Text(_MARGIN, top + number * _ABOUT_LINE, line, _ABOUT_SIZE, _GREY))

    def _row(self, sheet: np.ndarray, row: FeatureRow, y: int) -> None:
        """The tiles of a tap, with their captions, from `y` on."""
        for group, name, x in self.slots:
            tile = self._tile(group, name, row)
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
            y = self._wrapped(text, left + _BAR[0] + 44, y + 11) + 8
        for note in self.notes:
            y = self._wrapped(note, _MARGIN, y + 12) + 2
        return bars, y + 8

    def _wrapped(self, text: str, x: int, y: int) -> int:
        """Adds lines from a first base line on; returns where the next would begin."""
        for line in self._lines(text, _NOTE_SIZE, x=x):
            self.texts.append(_Text(x, y, line, _NOTE_SIZE))
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
                fontsize=_points(t.size),
                color=t.color,
                fontweight=t.weight,
                ha=t.align,
                va="baseline",
                parse_math=False,
            )
        canvas.draw()
        drawn = np.asarray(canvas.buffer_rgba())[:height, :width, :3]
        return cv2.cvtColor(np.ascontiguousarray(drawn), cv2.COLOR_RGB2BGR)


def wrapped(text: str, width: float, size: float, weight: str = "normal") -> list[str]:
    """Returns the lines of a text, each as wide as is allowed at most, as it is drawn.

    Lines end between words; within a word, a path for instance, where it is wider than a line alone.

    Args:
        width: in pixels.
        size, weight: of the text.
    """
    lines: list[str] = []
    line = ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if _width(joined, size, weight) <= width:
            line = joined
            continue
        lines += [line] if line else []
        while _width(word, size, weight) > width:
            # every letter adds to the width
            fits = bisect_right(range(1, len(word)), width, key=lambda n: _width(word[:n], size, weight)) or 1  # noqa: B023
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    return [*lines, line] if line else lines


def _points(size: float) -> float:
    """The size of a font, of which 72 are an inch."""
    return size * 72 / _DPI * 1.25


def _width(text: str, size: float, weight: str) -> float:
    """Pixels from left to right."""
    font = FontProperties(size=_points(size), weight=weight)
    return float(_measuring().get_text_width_height_descent(text, font, ismath=False)[0])


@cache
def _measuring() -> Any:
    canvas: Any = FigureCanvasAgg(Figure(dpi=_DPI))  # untyped
    return canvas.get_renderer()


def tinted(values: np.ndarray, colors: str) -> np.ndarray:
    """Returns numbers from 0 to 1 in the colors of a scale of matplotlib, uint8 (..., 3) RGB; others take its ends."""
    return np.asarray(matplotlib.colormaps[colors](values.clip(0, 1), bytes=True))[..., :3]


def _color_bar() -> np.ndarray:
    """A bar that shows the three colors and their mixtures."""
    across = np.linspace(0, 360, _BAR[0], endpoint=False)
    hsv = np.stack([across, np.full_like(across, 0.65), np.full_like(across, 0.9)], axis=-1)[None].astype(np.float32)
    rgb = np.rint(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * 255).astype(np.uint8)
    return np.broadcast_to(rgb, (_BAR[1], _BAR[0], 3))
