"""Drawing of detections, masks and label maps on an image, with matplotlib."""

from enum import Enum, unique
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import cv2
import matplotlib.colors as mplc
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, PathPatch, Rectangle
from matplotlib.path import Path
from PIL import Image

from d2lite.structures import BitMasks, BoxMode, Instances, PolygonMasks
from d2lite.utils.colormap import Color, brighten, palette_color, scale_lightness
from d2lite.utils.file_io import PathManager
from d2lite.utils.outlines import instance_rings, mask_contours, rings_box

__all__ = ["ColorMode", "VisImage", "Visualizer"]

DPI = 100
MIN_FONT_PIXELS = 11
"""Of the output; smaller text cannot be read."""


@unique
class ColorMode(Enum):
    """How instances are coloured."""

    IMAGE = 0
    """Each instance has its own colour."""
    SEGMENTATION = 1
    """Instances of a class have shades of one colour."""
    IMAGE_BW = 2
    """As IMAGE, and the image is grey outside of the masks."""


class VisImage:
    """A picture with a canvas over it. Coordinates on the canvas are pixels of the picture."""

    def __init__(self, img: np.ndarray, scale: float = 1.0) -> None:
        """
        Args:
            img: (H, W, 3), RGB in [0, 255].
            scale: size of the output relative to the picture.
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
        """Replace the picture under what was drawn; same size."""
        extent = (0, self.width, self.height, 0)
        self.ax.imshow(img.astype(np.uint8), extent=extent, interpolation="nearest", zorder=0)

    def save(self, filepath: str) -> None:
        """Write the result to an image file; its extension says the format."""
        self.fig.savefig(filepath)

    def get_image(self) -> np.ndarray:
        """Return the result, (H * scale, W * scale, 3), RGB, uint8."""
        self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())[..., :3].copy()


class Visualizer:
    """
    Draws on one image.

    .. code-block:: python

        visualizer = Visualizer(image[:, :, ::-1], MetadataCatalog.get("coco_2017_val"))
        visualizer.draw_instance_predictions(outputs["instances"].to("cpu")).save("out.png")
    """

    def __init__(
        self,
        img_rgb: np.ndarray,
        metadata: Any = None,
        scale: float = 1.0,
        instance_mode: ColorMode = ColorMode.IMAGE,
        font_size_scale: float = 1.0,
    ) -> None:
        """
        Args:
            img_rgb: (H, W, 3), RGB in [0, 255].
            metadata: of the dataset: `thing_classes`, `thing_colors`, `stuff_classes`, `stuff_colors` are used
                where it has them.
            scale: size of the output relative to the image.
            instance_mode: how instances are coloured.
            font_size_scale: of all text.
        """
        self.img = np.asarray(img_rgb).clip(0, 255).astype(np.uint8)
        self.metadata = metadata
        self.output = VisImage(self.img, scale=scale)
        side = scale * (self.output.height * self.output.width) ** 0.5
        self._font_size = max(side / 50, MIN_FONT_PIXELS) * font_size_scale * 72 / DPI / scale
        self._line_width = max(side / 320, 1.5) * 72 / DPI / scale
        self._instance_mode = instance_mode

    def get_output(self) -> VisImage:
        """Return the image with all that was drawn."""
        return self.output

    def draw_instance_predictions(self, predictions: Instances, jittering: bool = True) -> VisImage:
        """
        Draw the output of a detector.

        Args:
            predictions: on the CPU, with any of `pred_boxes`, `scores`, `pred_classes`, `pred_masks`.
            jittering: in mode SEGMENTATION, vary the shade between instances of a class.
        """
        fields = predictions.get_fields()
        if "pred_keypoints" in fields:
            raise NotImplementedError("Drawing keypoints is left out of d2lite; Detectron2 has it.")
        classes = _as_list(fields.get("pred_classes"))
        masks = fields.get("pred_masks")
        alpha = 0.5
        if self._instance_mode == ColorMode.IMAGE_BW:
            rings = self._all_rings(masks) if masks is not None else []
            self.output.reset_image(self._gray_outside(rings))
            alpha = 0.3
        return self.overlay_instances(
            boxes=fields.get("pred_boxes"),
            masks=masks,
            labels=_labels(classes, _as_list(fields.get("scores")), self._names("thing_classes")),
            assigned_colors=self._class_colors(classes, jittering),
            alpha=alpha,
        )

    def draw_dataset_dict(self, dic: Dict[str, Any]) -> VisImage:
        """
        Draw the annotations of one image in the standard dataset format.

        Args:
            dic: `annotations` (each with `bbox` and `bbox_mode`, or `segmentation`, and `category_id`), and
                `sem_seg` or `sem_seg_file_name`, where it has them.
        """
        annotations = dic.get("annotations") or []
        if annotations:
            classes = [a["category_id"] for a in annotations]
            crowd = [a.get("iscrowd", 0) for a in annotations]
            boxes = None
            if all("bbox" in a for a in annotations):
                boxes = [BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
            masks = None
            if all("segmentation" in a for a in annotations):
                masks = [a["segmentation"] for a in annotations]
            self.overlay_instances(
                boxes=boxes,
                masks=masks,
                labels=_labels(classes, None, self._names("thing_classes"), crowd),
                assigned_colors=self._class_colors(classes, jittering=True),
            )
        sem_seg = dic.get("sem_seg")
        if sem_seg is None and "sem_seg_file_name" in dic:
            with PathManager.open(dic["sem_seg_file_name"], "rb") as f:
                sem_seg = np.asarray(Image.open(f))
        if sem_seg is not None:
            self.draw_sem_seg(sem_seg, area_threshold=0, alpha=0.5)
        return self.output

    def draw_sem_seg(
        self, sem_seg: Union[torch.Tensor, np.ndarray], area_threshold: Optional[int] = None, alpha: float = 0.8
    ) -> VisImage:
        """
        Draw a map of class labels.

        Args:
            sem_seg: (H, W) integers; labels that have no class name are left out.
            area_threshold: regions with fewer pixels are left out.
            alpha: opacity in [0, 1].
        """
        sem_seg = np.asarray(sem_seg)
        labels, areas = np.unique(sem_seg, return_counts=True)
        names = self._names("stuff_classes")
        colors = getattr(self.metadata, "stuff_colors", None)
        for label in labels[np.argsort(-areas)].tolist():
            if label < 0 or label >= (len(names) if names else 255):
                continue
            self.draw_binary_mask(
                sem_seg == label,
                color=np.asarray(colors[label]) / 255 if colors else palette_color(label),
                edge_color=(1.0, 1.0, 0.94),
                text=names[label] if names else str(label),
                alpha=alpha,
                area_threshold=area_threshold or 0,
            )
        return self.output

    def overlay_instances(
        self,
        *,
        boxes: Any = None,
        labels: Optional[List[str]] = None,
        masks: Any = None,
        keypoints: Any = None,
        assigned_colors: Optional[List[Color]] = None,
        alpha: float = 0.5,
    ) -> VisImage:
        """
        Draw N instances, large ones first.

        Args:
            boxes: `Boxes`, or XYXY boxes as a tensor or array of shape (N, 4).
            labels: N texts.
            masks: `BitMasks`, `PolygonMasks`, booleans of shape (N, H, W), or a list of COCO polygons, RLEs or
                bitmaps.
            keypoints: must be None; drawing them is left out.
            assigned_colors: N colours; None takes them from the palette.
            alpha: opacity of the masks in [0, 1].
        """
        if keypoints is not None:
            raise NotImplementedError("Drawing keypoints is left out of d2lite; Detectron2 has it.")
        rings = self._all_rings(masks) if masks is not None else None
        boxes = None if boxes is None else np.asarray(getattr(boxes, "tensor", boxes)).reshape(-1, 4)
        num_instances = max((len(x) for x in (boxes, rings, labels) if x is not None), default=0)
        for name, given in (("boxes", boxes), ("masks", rings), ("labels", labels), ("colors", assigned_colors)):
            if given is not None and len(given) != num_instances:
                raise ValueError(f"overlay_instances got {len(given)} {name} for {num_instances} instances")
        if boxes is None and rings is not None:
            extents = np.stack([rings_box(r) for r in rings]) if rings else np.zeros((0, 4))
        else:
            extents = np.zeros((num_instances, 4)) if boxes is None else boxes
        areas = (extents[:, 2:] - extents[:, :2]).prod(axis=1)
        for i in np.argsort(-areas, kind="stable"):
            color = palette_color(i) if assigned_colors is None else assigned_colors[i]
            if rings is not None:
                self._draw_rings(rings[i], color, None, alpha)
            if boxes is not None:
                self.draw_box(boxes[i], edge_color=color, alpha=0.9)
            if labels is not None:
                self._draw_label(labels[i], extents[i], color)
        return self.output

    def draw_text(
        self,
        text: str,
        position: Tuple[float, float],
        *,
        font_size: Optional[float] = None,
        color: Color = "g",
        horizontal_alignment: str = "center",
        rotation: float = 0,
    ) -> VisImage:
        """
        Write text on a dark ground.

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
        """Draw the outline of a box (x0, y0, x1, y1)."""
        x0, y0, x1, y1 = (float(c) for c in box_coord)
        style = {"edgecolor": edge_color, "linewidth": self._scaled_line(), "alpha": alpha, "linestyle": line_style}
        self.output.ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, zorder=5, **style))
        return self.output

    def draw_circle(self, circle_coord: Sequence[float], color: Color, radius: float = 3) -> VisImage:
        """Draw a filled circle with its centre at (x, y)."""
        self.output.ax.add_patch(Circle(tuple(circle_coord), radius=radius, fill=True, color=color))
        return self.output

    def draw_line(
        self,
        x_data: Sequence[float],
        y_data: Sequence[float],
        color: Color,
        linestyle: str = "-",
        linewidth: Optional[float] = None,
    ) -> VisImage:
        """Draw a line through points; its width is in points at scale 1."""
        width = (self._line_width if linewidth is None else linewidth) * self.output.scale
        self.output.ax.add_line(Line2D(x_data, y_data, linewidth=width, color=color, linestyle=linestyle))
        return self.output

    def draw_binary_mask(
        self,
        binary_mask: np.ndarray,
        color: Optional[Color] = None,
        *,
        edge_color: Optional[Color] = None,
        text: Optional[str] = None,
        alpha: float = 0.5,
        area_threshold: float = 10,
    ) -> VisImage:
        """
        Draw a mask, holes left free.

        Args:
            binary_mask: (H, W).
            color: of the area; None takes it from the palette.
            edge_color: of the outline; None: a darker shade.
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
        self._draw_rings(mask_contours(np.isin(regions, kept)), color, edge_color, alpha)
        if text is not None:
            ys, xs = np.nonzero(regions == 1 + areas.argmax())
            self.draw_text(text, (float(np.median(xs)), float(np.median(ys))), color=color)
        return self.output

    def draw_polygon(
        self, segment: np.ndarray, color: Color, edge_color: Optional[Color] = None, alpha: float = 0.5
    ) -> VisImage:
        """Draw a filled polygon with corners (N, 2)."""
        self._draw_rings([np.asarray(segment, dtype=np.float64).reshape(-1, 2)], color, edge_color, alpha)
        return self.output

    def _draw_rings(
        self, rings: List[np.ndarray], color: Color, edge_color: Optional[Color], alpha: float
    ) -> None:
        """Fill the area between closed lines of (K, 2) points; a line of opposite direction inside is a hole."""
        if not rings:
            return
        path = Path.make_compound_path(*(Path(np.vstack((r, r[:1])), closed=True) for r in rings))
        face, edge = mplc.to_rgb(color), mplc.to_rgb(edge_color or scale_lightness(color, 0.7))
        style = {"facecolor": (*face, alpha), "edgecolor": (*edge, 1.0), "linewidth": self._scaled_line() / 2}
        self.output.ax.add_patch(PathPatch(path, zorder=4, **style))

    def _draw_label(self, text: str, box: np.ndarray, color: Color) -> None:
        x0, y0, x1, y1 = box
        height = self._font_size * DPI / 72 * 1.4
        # Above the box where a small one would be covered, as long as there is room.
        above = y1 - y0 < 3 * height and y0 >= height
        self.draw_text(text, (x0, y0 - height if above else y0), color=color, horizontal_alignment="left")

    def _scaled_line(self) -> float:
        return self._line_width * self.output.scale

    def _names(self, key: str) -> Optional[List[str]]:
        return getattr(self.metadata, key, None)

    def _class_colors(self, classes: Optional[List[int]], jittering: bool) -> Optional[List[Color]]:
        colors = getattr(self.metadata, "thing_colors", None)
        if self._instance_mode != ColorMode.SEGMENTATION or not classes:
            return None
        base = [np.asarray(colors[c]) / 255 if colors else palette_color(c) for c in classes]
        if not jittering:
            return base
        shades = np.linspace(0.75, 1.25, 5)
        return [scale_lightness(color, shades[2 * i % 5]) for i, color in enumerate(base)]

    def _all_rings(self, masks: Any) -> List[List[np.ndarray]]:
        if isinstance(masks, PolygonMasks):
            masks = masks.polygons
        elif isinstance(masks, BitMasks):
            masks = masks.tensor
        return [instance_rings(m, self.output.height, self.output.width) for m in masks]

    def _gray_outside(self, rings: List[List[np.ndarray]]) -> np.ndarray:
        inside = np.zeros(self.img.shape[:2], dtype=np.uint8)
        for instance in rings:
            cv2.fillPoly(inside, [np.round(ring - 0.5).astype(np.int32) for ring in instance], 1)
        gray = cv2.cvtColor(self.img, cv2.COLOR_RGB2GRAY)[..., None]
        return np.where(inside[..., None] > 0, self.img, gray)


def _as_list(values: Optional[torch.Tensor]) -> Optional[list]:
    return None if values is None else values.tolist()


def _labels(
    classes: Optional[List[int]],
    scores: Optional[List[float]],
    names: Optional[List[str]],
    crowd: Optional[List[int]] = None,
) -> Optional[List[str]]:
    """Texts such as "cat 97%" or "cat|crowd"; None if there is nothing to say."""
    if classes is None and scores is None:
        return None
    count = len(classes if classes is not None else scores)
    labels = [""] * count if classes is None else [names[c] if names else str(c) for c in classes]
    if scores is not None:
        labels = [f"{label} {score:.0%}".strip() for label, score in zip(labels, scores)]
    return [label + ("|crowd" if crowd and crowd[i] else "") for i, label in enumerate(labels)]
