"""The augmentations that resize."""

import sys
from collections.abc import Sequence

import numpy as np
import torch
from fvcore.transforms.transform import NoOpTransform, Transform

from d2lite.data.transforms.augmentation import Augmentation
from d2lite.data.transforms.transform import BILINEAR, ResizeTransform

__all__ = ["RandomResize", "Resize", "ResizeScale", "ResizeShortestEdge"]


class ResizeShortestEdge(Augmentation):
    """Resizes the shorter edge to a random length, or less where the longer edge would exceed `max_size`."""

    @torch.jit.unused
    def __init__(
        self,
        short_edge_length: int | Sequence[int],
        max_size: int = sys.maxsize,
        sample_style: str = "range",
        interp: int = BILINEAR,
    ) -> None:
        """
        Args:
            short_edge_length: [min, max] for "range", the lengths to choose from for "choice"; or one length.
            max_size: upper limit of the longer edge, in pixels.
            sample_style: "range" or "choice".
            interp: a PIL resampling number.
        """
        super().__init__()
        assert sample_style in ("range", "choice"), f"sample_style is range or choice, got {sample_style!r}"
        self.is_range = sample_style == "range"
        if isinstance(short_edge_length, int):
            short_edge_length = (short_edge_length, short_edge_length)
        if self.is_range:
            assert len(short_edge_length) == 2, f'"range" needs [min, max], got {short_edge_length}'
        self._init(locals())

    # TorchScript compiles get_output_shape with its class and would follow annotations even of unused methods.
    @torch.jit.unused
    def get_transform(self, image):  # type: ignore[no-untyped-def]
        """Samples a length; a length of 0 leaves the image as it is."""
        if self.is_range:
            length = np.random.randint(self.short_edge_length[0], self.short_edge_length[1] + 1)
        else:
            length = np.random.choice(self.short_edge_length)
        if length == 0:
            return NoOpTransform()
        h, w = image.shape[:2]
        return ResizeTransform(h, w, *self.get_output_shape(h, w, int(length), self.max_size), self.interp)

    @staticmethod
    def get_output_shape(oldh: int, oldw: int, short_edge_length: int, max_size: int) -> tuple[int, int]:
        """Size (height, width) of the output, at least one pixel each. TorchScript can compile this function."""
        scale = float(short_edge_length) / min(oldh, oldw)
        newh, neww = oldh * scale, oldw * scale
        if oldh < oldw:
            newh = float(short_edge_length)
        else:
            neww = float(short_edge_length)
        longer = max(newh, neww)
        if longer > max_size:
            newh, neww = newh * (float(max_size) / longer), neww * (float(max_size) / longer)
        return max(int(newh + 0.5), 1), max(int(neww + 0.5), 1)


class Resize(Augmentation):
    """Resizes to a fixed size."""

    def __init__(self, shape: int | tuple[int, int], interp: int = BILINEAR) -> None:
        """
        Args:
            shape: (height, width), or one number for both.
            interp: a PIL resampling number.
        """
        shape = (shape, shape) if isinstance(shape, int) else tuple(shape)
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        """The resize from the image's size."""
        return ResizeTransform(*image.shape[:2], *self.shape, self.interp)


class RandomResize(Augmentation):
    """Resizes to one of several sizes."""

    def __init__(self, shape_list: Sequence[tuple[int, int]], interp: int = BILINEAR) -> None:
        """
        Args:
            shape_list: sizes (height, width) to choose from.
            interp: a PIL resampling number.
        """
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        """Samples a size."""
        h, w = self.shape_list[np.random.choice(len(self.shape_list))]
        return ResizeTransform(*image.shape[:2], h, w, self.interp)


class ResizeScale(Augmentation):
    """Scale jitter: fits the image into a random multiple of the target size, keeping its aspect ratio."""

    def __init__(
        self,
        min_scale: float,
        max_scale: float,
        target_height: int,
        target_width: int,
        interp: int = BILINEAR,
    ) -> None:
        """
        Args:
            min_scale, max_scale: range of the multiple.
            target_height, target_width: the target size, in pixels.
            interp: a PIL resampling number.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        """Samples a multiple."""
        scale = np.random.uniform(self.min_scale, self.max_scale)
        size = np.array(image.shape[:2])
        ratio = (scale * np.array([self.target_height, self.target_width]) / size).min()
        h, w = np.round(size * ratio).astype(int).clip(min=1).tolist()
        return ResizeTransform(*image.shape[:2], h, w, self.interp)
