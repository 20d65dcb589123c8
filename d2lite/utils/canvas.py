"""An image with text, boxes, masks and lines drawn over it, on matplotlib."""

from collections.abc import Sequence

import cv2
import matplotlib.colors as mplc
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, PathPatch, Rectangle
from matplotlib.path import Path

from d2lite.utils.colormap import Color, brighten, palette_color, scale_lightness
from d2lite.utils.outlines import has_holes, mask_contours

__all__ = ["Canvas", "VisImage"]

DPI = 100
MIN_FONT_PIXELS = 11
"""Of the output; smaller text cannot be read."""


class VisImage:
    """An image with a canvas over it. Coordinates on the canvas are pixels of the image."""

    def __init__(self, img: np.ndarray, scale: float = 1.0) -> None:
        """
        Args:
            img: (H, W, 3), RGB in [0, 255].
            scale: size of the output relative to the image.
        """
        self.img = img
        self.scale = scale
        self.height, self.width = img.shape[:2]
        self.fig = Figure(frameon=False, dpi=DPI)
        # A hundredth of a pixel more, so that truncation does not lose one.
        self.fig.set_size_inches((self.width * scale + 0.01) / DPI, (self.height * scale + 0.01) / DPI)
        self.canvas = FigureCanvasAgg(self.fig)
        self.ax = self.fig.add_axes((0.0, 0.0, 1.0, 1.0))
        self.ax.axis("off")
        self.reset_image(img)

    def reset_image(self, img: np.ndarray) -> None:
        """Replaces the image below the drawing by another one of the same size."""
        extent = (0, self.width, self.height, 0)
        self.ax.imshow(img.astype(np.uint8), extent=extent, interpolation="nearest", zorder=0)

    def save(self, filepath: str) -> None:
        """Writes the result to an image file; its extension determines the format."""
        self.fig.savefig(filepath)

    def get_image(self) -> np.ndarray:
        """Returns the result, (H * scale, W * scale, 3), RGB, uint8."""
        self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())[..., :3].copy()


class Canvas:
    """Drawing primitives on one image, with text and lines sized for it."""

    def __init__(self, img_rgb: np.ndarray, scale: float = 1.0, font_size_scale: float = 1.0) -> None:
        """
        Args:
            img_rgb: (H, W, 3), RGB in [0, 255].
            scale: size of the output relative to the image.
            font_size_scale: of all text.
        """
        self.img = np.asarray(img_rgb).clip(0, 255).astype(np.uint8)
        self.output = VisImage(self.img, scale=scale)
        side = scale * (self.output.height * self.output.width) ** 0.5
        self._font_size = max(side / 50, MIN_FONT_PIXELS) * font_size_scale * 72 / DPI / scale
        self._line_width = max(side / 320, 1.5) * 72 / DPI / scale

    def get_output(self) -> VisImage:
        """Returns the image with all that was drawn."""
        return self.output

    def draw_text(
        self,
        text: str,
        position: tuple[float, float],
        *,
        font_size: float | None = None,
        color: Color = "g",
        horizontal_alignment: str = "center",
        rotation: float = 0,
    ) -> VisImage:
        """Writes text on a dark background.

        Args:
            text: may have several lines.
            position: (x, y) in pixels: the upper end, and horizontally the place that is aligned.
            font_size: in points at scale 1; None chooses by the image's size.
            color: of the text; made brighter if it is dark.
            horizontal_alignment: left | center | right.
            rotation: degrees, counter-clockwise.
        """
        size = (self._font_size if font_size is None else font_size) * self.output.scale
        self.output.ax.text(
            *position,
            text,
            size=size,
            family="sans-serif",
            bbox={"facecolor": "black", "alpha": 0.75, "pad": 0.12 * size, "edgecolor": "none"},
            verticalalignment="top",
            horizontalalignment=horizontal_alignment,
            color=brighten(color),
            zorder=10,
            rotation=rotation,
            clip_on=True,
        )
        return self.output

    def draw_box(
        self, box_coord: Sequence[float], alpha: float = 0.5, edge_color: Color = "g", line_style: str = "-"
    ) -> VisImage:
        """Draws the outline of a box (x0, y0, x1, y1)."""
        x0, y0, x1, y1 = (float(c) for c in box_coord)
        style = {
            "edgecolor": edge_color,
            "linewidth": self._scaled_line(),
            "alpha": alpha,
            "linestyle": line_style,
        }
        self.output.ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, zorder=5, **style))
        return self.output

    def draw_circle(self, circle_coord: Sequence[float], color: Color, radius: float = 3) -> VisImage:
        """Draws a filled circle with its center at (x, y)."""
        self.output.ax.add_patch(Circle(tuple(circle_coord), radius=radius, fill=True, color=color))
        return self.output

    def draw_line(
        self,
        x_data: Sequence[float],
        y_data: Sequence[float],
        color: Color,
        linestyle: str = "-",
        linewidth: float | None = None,
    ) -> VisImage:
        """Draws a line through points; its width is in points at scale 1."""
        width = (self._line_width if linewidth is None else linewidth) * self.output.scale
        self.output.ax.add_line(Line2D(x_data, y_data, linewidth=width, color=color, linestyle=linestyle))
        return self.output

    def draw_binary_mask(
        self,
        binary_mask: np.ndarray,
        color: Color | None = None,
        *,
        edge_color: Color | None = None,
        text: str | None = None,
        alpha: float = 0.5,
        area_threshold: float = 10,
    ) -> VisImage:
        """Draws a mask, holes left free. One with holes is drawn pixel by pixel, others as outlined areas.

        Args:
            binary_mask: (H, W).
            color: of the area; None takes it from the palette.
            edge_color: of the outline, if there is one; None: a darker shade.
            text: written on the largest connected part.
            alpha: opacity in [0, 1].
            area_threshold: connected parts with fewer pixels are left out.
        """
        color = palette_color(0) if color is None else color
        mask = np.asarray(binary_mask).astype(np.uint8)
        count, regions, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
        areas = stats[1:, cv2.CC_STAT_AREA]
        kept = 1 + np.flatnonzero(areas >= area_threshold)
        if count < 2 or len(kept) == 0:
            return self.output
        mask = np.isin(regions, kept)
        if has_holes(mask):
            self._overlay(mask * alpha, color)
        else:
            self._draw_rings(mask_contours(mask), color, edge_color, alpha)
        if text is not None:
            self._write_at(regions == 1 + areas.argmax(), text, color)
        return self.output

    def draw_soft_mask(
        self,
        soft_mask: np.ndarray,
        color: Color | None = None,
        *,
        text: str | None = None,
        alpha: float = 0.5,
    ) -> VisImage:
        """Draws a mask whose values are the opacity of the color.

        Args:
            soft_mask: (H, W), in [0, 1].
            color: of the area; None takes it from the palette.
            text: written on the largest connected part above 0.5.
            alpha: opacity where the mask is 1.
        """
        color = palette_color(0) if color is None else color
        self._overlay(np.asarray(soft_mask, dtype=np.float64) * alpha, color)
        binary = (np.asarray(soft_mask) > 0.5).astype(np.uint8)
        count, regions, stats, _ = cv2.connectedComponentsWithStats(binary, connectivity=8)
        if text is not None and count > 1:
            self._write_at(regions == 1 + stats[1:, cv2.CC_STAT_AREA].argmax(), text, color)
        return self.output

    def _overlay(self, opacity: np.ndarray, color: Color) -> None:
        """Blends one color over the image, (H, W) opacity in [0, 1]."""
        rgba = np.empty((*opacity.shape, 4))
        rgba[..., :3], rgba[..., 3] = mplc.to_rgb(color), opacity
        extent = (0, self.output.width, self.output.height, 0)
        self.output.ax.imshow(rgba, extent=extent, interpolation="nearest")

    def _write_at(self, region: np.ndarray, text: str, color: Color) -> None:
        """Writes at the median of the pixels that are set."""
        ys, xs = np.nonzero(region)
        self.draw_text(text, (float(np.median(xs)), float(np.median(ys))), color=color)

    def draw_polygon(
        self, segment: np.ndarray, color: Color, edge_color: Color | None = None, alpha: float = 0.5
    ) -> VisImage:
        """Draws a filled polygon with corners (N, 2)."""
        self._draw_rings([np.asarray(segment, dtype=np.float64).reshape(-1, 2)], color, edge_color, alpha)
        return self.output

    def _draw_rings(self, rings: list[np.ndarray], color: Color, edge_color: Color | None, alpha: float) -> None:
        """Fills the area between closed lines of (K, 2) points; a line of opposite orientation inside is a hole."""
        if not rings:
            return
        path = Path.make_compound_path(*(Path(np.vstack((r, r[:1])), closed=True) for r in rings))
        face, edge = mplc.to_rgb(color), mplc.to_rgb(edge_color or scale_lightness(color, 0.7))
        style = {"facecolor": (*face, alpha), "edgecolor": (*edge, 1.0), "linewidth": self._scaled_line() / 2}
        self.output.ax.add_patch(PathPatch(path, zorder=4, **style))

    def _scaled_line(self) -> float:
        return self._line_width * self.output.scale
