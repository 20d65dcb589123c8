"""Drawing of detections, annotations and label maps on an image."""

from enum import Enum, unique
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from d2lite.structures import BitMasks, BoxMode, Instances, PolygonMasks
from d2lite.utils.canvas import DPI, Canvas, VisImage
from d2lite.utils.colormap import Color, palette_color, scale_lightness
from d2lite.utils.file_io import PathManager
from d2lite.utils.outlines import instance_rings, rings_box

__all__ = ["ColorMode", "VisImage", "Visualizer"]


@unique
class ColorMode(Enum):
    """Coloring of instances."""

    IMAGE = 0
    """Each instance has its own color."""
    SEGMENTATION = 1
    """Instances of a class have shades of one color."""
    IMAGE_BW = 2
    """As IMAGE, and the image is gray outside of the masks."""


class Visualizer(Canvas):
    """Draws on one image.

    Example::

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
            instance_mode: how instances are colored.
            font_size_scale: of all text.
        """
        super().__init__(img_rgb, scale, font_size_scale)
        self.metadata = metadata
        self._instance_mode = instance_mode

    def draw_instance_predictions(self, predictions: Instances, jittering: bool = True) -> VisImage:
        """Draws the output of a detector.

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

    def draw_dataset_dict(self, dic: dict[str, Any]) -> VisImage:
        """Draws the annotations of one image in the standard dataset format.

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
        self,
        sem_seg: torch.Tensor | np.ndarray,
        area_threshold: int | None = None,
        alpha: float = 0.8,
    ) -> VisImage:
        """Draws a map of class labels.

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
        labels: list[str] | None = None,
        masks: Any = None,
        keypoints: Any = None,
        assigned_colors: list[Color] | None = None,
        alpha: float = 0.5,
    ) -> VisImage:
        """Draws N instances, large ones first.

        Args:
            boxes: `Boxes`, or XYXY boxes as a tensor or array of shape (N, 4).
            labels: N texts.
            masks: `BitMasks`, `PolygonMasks`, booleans of shape (N, H, W), or a list of COCO polygons, RLEs or
                bitmaps.
            keypoints: must be None; drawing them is left out.
            assigned_colors: N colors; None takes them from the palette.
            alpha: opacity of the masks in [0, 1].
        """
        if keypoints is not None:
            raise NotImplementedError("Drawing keypoints is left out of d2lite; Detectron2 has it.")
        rings = self._all_rings(masks) if masks is not None else None
        boxes = None if boxes is None else np.asarray(getattr(boxes, "tensor", boxes)).reshape(-1, 4)
        num_instances = max((len(x) for x in (boxes, rings, labels) if x is not None), default=0)
        for name, given in (
            ("boxes", boxes),
            ("masks", rings),
            ("labels", labels),
            ("colors", assigned_colors),
        ):
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

    def _draw_label(self, text: str, box: np.ndarray, color: Color) -> None:
        x0, y0, x1, y1 = box
        height = self._font_size * DPI / 72 * 1.4
        # Above the box where a small one would be covered, as long as there is room.
        above = y1 - y0 < 3 * height and y0 >= height
        self.draw_text(text, (x0, y0 - height if above else y0), color=color, horizontal_alignment="left")

    def _names(self, key: str) -> list[str] | None:
        return getattr(self.metadata, key, None)

    def _class_colors(self, classes: list[int] | None, jittering: bool) -> list[Color] | None:
        colors = getattr(self.metadata, "thing_colors", None)
        if self._instance_mode != ColorMode.SEGMENTATION or not classes:
            return None
        base = [np.asarray(colors[c]) / 255 if colors else palette_color(c) for c in classes]
        if not jittering:
            return base
        shades = np.linspace(0.75, 1.25, 5)
        return [scale_lightness(color, shades[2 * i % 5]) for i, color in enumerate(base)]

    def _all_rings(self, masks: Any) -> list[list[np.ndarray]]:
        if isinstance(masks, PolygonMasks):
            masks = masks.polygons
        elif isinstance(masks, BitMasks):
            masks = masks.tensor
        return [instance_rings(m, self.output.height, self.output.width) for m in masks]

    def _gray_outside(self, rings: list[list[np.ndarray]]) -> np.ndarray:
        inside = np.zeros(self.img.shape[:2], dtype=np.uint8)
        for instance in rings:
            cv2.fillPoly(inside, [np.round(ring - 0.5).astype(np.int32) for ring in instance], 1)
        gray = cv2.cvtColor(self.img, cv2.COLOR_RGB2GRAY)[..., None]
        return np.where(inside[..., None] > 0, self.img, gray)


def _as_list(values: torch.Tensor | None) -> list | None:
    return None if values is None else values.tolist()


def _labels(
    classes: list[int] | None,
    scores: list[float] | None,
    names: list[str] | None,
    crowd: list[int] | None = None,
) -> list[str] | None:
    """Texts such as "cat 97%" or "cat|crowd"; None if there is no text."""
    if classes is None and scores is None:
        return None
    count = len(classes if classes is not None else scores)
    labels = [""] * count if classes is None else [names[c] if names else str(c) for c in classes]
    if scores is not None:
        labels = [f"{label} {score:.0%}".strip() for label, score in zip(labels, scores)]
    return [label + ("|crowd" if crowd and crowd[i] else "") for i, label in enumerate(labels)]
