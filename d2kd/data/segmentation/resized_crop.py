"""A random crop out of a resized image, of which only the part is computed that is kept."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from detectron2.data import transforms as T

#: Crops that are tried for one in which no class fills too much.
TRIES = 10


class ResizedCrop(T.Augmentation):
    """Detectron2's `ResizeShortestEdge`, then its `RandomCrop_CategoryAreaConstraint`, in a fraction of the time."""

    def __init__(
        self,
        resize: T.ResizeShortestEdge,
        crop_type: str,
        crop_size: Sequence[float],
        single_category_max_area: float = 1.0,
        ignored: int | None = None,
    ) -> None:
        """
        Args:
            resize: draws the size.
            crop_type, crop_size: as for Detectron2's `RandomCrop`.
            single_category_max_area: share of the labeled pixels that one class may fill, if a crop can be found.
            ignored: label that does not count.
        """
        super().__init__()
        self._init(locals())
        self._crop = T.RandomCrop(crop_type, crop_size)

    def get_transform(self, image: np.ndarray, sem_seg: np.ndarray | None) -> "ResizedCropTransform":
        """Draws a size and a place; up to `TRIES` of them where one class fills too much."""
        h, w = image.shape[:2]
        resize = self.resize.get_transform(image)
        new_h: Any = getattr(resize, "new_h", h)
        new_w: Any = getattr(resize, "new_w", w)
        size = (int(new_h), int(new_w))
        crop = self._crop.get_crop_size(size)
        for _ in range(TRIES):
            y0, x0 = (int(np.random.randint(whole - part + 1)) for whole, part in zip(size, crop))
            transform = ResizedCropTransform(h, w, size, (y0, x0), crop)
            if self.single_category_max_area >= 1.0 or sem_seg is None or self._is_mixed(transform, sem_seg):
                break
        return transform

    def _is_mixed(self, transform: "ResizedCropTransform", sem_seg: np.ndarray) -> bool:
        labels = transform.apply_segmentation(sem_seg)
        counts = np.bincount(labels.ravel())
        if self.ignored is not None and self.ignored < len(counts):
            counts[self.ignored] = 0
        return bool((counts > 0).sum() > 1 and counts.max() < counts.sum() * self.single_category_max_area)


class ResizedCropTransform(T.Transform):
    """Resizes an image of (h, w) pixels, bilinearly, and cuts a rectangle out."""

    h: int
    w: int
    size: tuple[int, int]
    corner: tuple[int, int]
    crop: tuple[int, int]

    def __init__(self, h: int, w: int, size: tuple[int, int], corner: tuple[int, int], crop: tuple[int, int]) -> None:
        """
        Args:
            h, w: size of the input in pixels.
            size: height and width of the resized image.
            corner: row and column of the rectangle's first pixel in it.
            crop: height and width of the rectangle.
        """
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Resizes (H, W) or (H, W, C); uint8 as Pillow does, which antialiases, other types as Detectron2 does them."""
        (y0, x0), (height, width) = self.corner, self.crop
        if img.dtype != np.uint8 or img.ndim > 3:
            resized: np.ndarray = T.ResizeTransform(self.h, self.w, *self.size).apply_image(img)
            return resized[y0 : y0 + height, x0 : x0 + width]
        gray = img.ndim == 3 and img.shape[2] == 1
        source = img[:, :, 0] if gray else img
        y, x = self.h / self.size[0], self.w / self.size[1]
        box = [x0 * x, y0 * y, min((x0 + width) * x, self.w), min((y0 + height) * y, self.h)]
        # the filter reaches that far beyond the box
        left, top = (max(0, math.floor(edge - max(step, 1)) - 1) for edge, step in ((box[0], x), (box[1], y)))
        right, bottom = (math.ceil(edge + max(step, 1)) + 1 for edge, step in ((box[2], x), (box[3], y)))
        whole = Image.fromarray(np.ascontiguousarray(source[top:bottom, left:right]))
        within = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
        part = np.asarray(whole.resize((width, height), Image.Resampling.BILINEAR, box=within))
        return part[:, :, None] if gray else part

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Takes the nearest labels of a map (H, W)."""
        rows, columns = (self._nearest(axis) for axis in (0, 1))
        found: np.ndarray = segmentation[rows][:, columns]
        return found

    def _nearest(self, axis: int) -> np.ndarray:
        start, length, whole = self.corner[axis], self.crop[axis], (self.h, self.w)[axis]
        places = (np.arange(start, start + length) + 0.5) * (whole / self.size[axis])
        return places.astype(np.int64).clip(max=whole - 1)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Scales and shifts points (N, 2), given as (x, y)."""
        scale = np.array([self.size[1] / self.w, self.size[0] / self.h])
        moved: Any = coords * scale - np.array(self.corner[::-1])
        return moved
