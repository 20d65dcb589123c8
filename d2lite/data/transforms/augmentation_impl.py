"""The augmentations: each samples from numpy's global generator and returns the transform."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from fvcore.transforms.transform import (
    CropTransform,
    HFlipTransform,
    NoOpTransform,
    PadTransform,
    Transform,
    TransformList,
    VFlipTransform,
)

from d2lite.data.transforms.augmentation import AugInput, Augmentation, _as_augmentation
from d2lite.data.transforms.augmentation_color import (
    RandomBrightness,
    RandomContrast,
    RandomLighting,
    RandomSaturation,
)
from d2lite.data.transforms.augmentation_resize import RandomResize, Resize, ResizeScale, ResizeShortestEdge
from d2lite.data.transforms.transform import ExtentTransform, RotationTransform

__all__ = [
    "FixedSizeCrop",
    "RandomApply",
    "RandomBrightness",
    "RandomContrast",
    "RandomCrop",
    "RandomCrop_CategoryAreaConstraint",
    "RandomExtent",
    "RandomFlip",
    "RandomLighting",
    "RandomResize",
    "RandomRotation",
    "RandomSaturation",
    "Resize",
    "ResizeScale",
    "ResizeShortestEdge",
]


class RandomFlip(Augmentation):
    """Flips with a probability, either horizontally or vertically."""

    def __init__(self, prob: float = 0.5, *, horizontal: bool = True, vertical: bool = False) -> None:
        """
        Args:
            prob: probability of a flip.
            horizontal, vertical: exactly one must be True.

        Raises:
            ValueError: if both or neither are True.
        """
        super().__init__()
        if horizontal == vertical:
            raise ValueError("RandomFlip flips one way: set either horizontal or vertical (use two for both)")
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        """Samples whether to flip."""
        h, w = image.shape[:2]
        if self._rand_range() >= self.prob:
            return NoOpTransform()
        return HFlipTransform(w) if self.horizontal else VFlipTransform(h)


class RandomCrop(Augmentation):
    """Crops a rectangle of a given or random size at a random position."""

    def __init__(self, crop_type: str, crop_size: Sequence[float]) -> None:
        """
        Args:
            crop_type: what `crop_size` means. "relative": fractions of height and width; "relative_range":
                the minimum of these fractions, each is sampled from [fraction, 1]; "absolute": height and width,
                clipped to the image's; "absolute_range": [min, max], from which height and width are sampled.
            crop_size: two numbers.
        """
        super().__init__()
        self._init(locals())
        types = ("relative_range", "relative", "absolute", "absolute_range")
        assert crop_type in types, f"crop_type must be one of {types}, got {crop_type!r}"
        if crop_type == "absolute_range":
            assert crop_size[0] <= crop_size[1], f"absolute_range needs [min, max], got {crop_size}"

    def get_transform(self, image: np.ndarray) -> Transform:
        """Samples the size, then the top, then the left."""
        h, w = image.shape[:2]
        crop_h, crop_w = self.get_crop_size((h, w))
        assert h >= crop_h and w >= crop_w, f"cannot crop {crop_h} x {crop_w} from an image of {h} x {w}"
        y0 = np.random.randint(h - crop_h + 1)
        x0 = np.random.randint(w - crop_w + 1)
        return CropTransform(x0, y0, crop_w, crop_h, w, h)

    def get_crop_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Size (height, width) of the crop for an image of (height, width)."""
        h, w = image_size
        if self.crop_type == "absolute":
            return min(self.crop_size[0], h), min(self.crop_size[1], w)
        if self.crop_type == "absolute_range":
            low, high = self.crop_size
            crop_h = np.random.randint(min(h, low), min(h, high) + 1)
            return crop_h, np.random.randint(min(w, low), min(w, high) + 1)
        rel_h, rel_w = self.crop_size
        if self.crop_type == "relative_range":
            least = np.asarray(self.crop_size, dtype=np.float32)
            rel_h, rel_w = least + np.random.rand(2) * (1 - least)
        return int(h * rel_h + 0.5), int(w * rel_w + 0.5)


class RandomCrop_CategoryAreaConstraint(Augmentation):
    """A `RandomCrop` that avoids crops in which one category fills too much of the area."""

    def __init__(
        self,
        crop_type: str,
        crop_size: Sequence[float],
        single_category_max_area: float = 1.0,
        ignored_category: int | None = None,
    ) -> None:
        """
        Args:
            crop_type, crop_size: as for `RandomCrop`.
            single_category_max_area: maximum share of the labeled crop that one category may fill.
            ignored_category: a label that is ignored.
        """
        self.crop_aug = RandomCrop(crop_type, crop_size)
        self._init(locals())

    def get_transform(self, image: np.ndarray, sem_seg: np.ndarray) -> Transform:
        """Samples up to ten crops and returns the first that fits, else the last."""
        if self.single_category_max_area >= 1.0:
            return self.crop_aug.get_transform(image)
        for _ in range(10):
            crop = self.crop_aug.get_transform(image)
            labels, counts = np.unique(crop.apply_segmentation(sem_seg), return_counts=True)
            counts = counts[labels != self.ignored_category] if self.ignored_category is not None else counts
            if len(counts) > 1 and counts.max() < counts.sum() * self.single_category_max_area:
                break
        return crop


class FixedSizeCrop(Augmentation):
    """Crops to a size at a random position where the image is larger, and pads at the end where it is smaller."""

    def __init__(
        self, crop_size: tuple[int, int], pad: bool = True, pad_value: float = 128.0, seg_pad_value: int = 255
    ) -> None:
        """
        Args:
            crop_size: (height, width).
            pad: whether smaller images are padded to the size.
            pad_value, seg_pad_value: values of the padding in images and in label maps.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> TransformList:
        """Samples the position; one random number determines both coordinates."""
        size, out = np.array(image.shape[:2]), np.array(self.crop_size)
        y0, x0 = np.round(np.maximum(size - out, 0) * np.random.uniform(0.0, 1.0)).astype(int).tolist()
        (h, w), (out_h, out_w) = size.tolist(), out.tolist()
        transforms = [CropTransform(x0, y0, out_w, out_h, w, h)]
        if self.pad:
            kept_h, kept_w = min(h, out_h), min(w, out_w)
            values = (self.pad_value, self.seg_pad_value)
            transforms.append(PadTransform(0, 0, out_w - kept_w, out_h - kept_h, kept_w, kept_h, *values))
        return TransformList(transforms)


class RandomExtent(Augmentation):
    """Takes a rectangle of random size around a random center; it may extend beyond the image."""

    def __init__(self, scale_range: tuple[float, float], shift_range: tuple[float, float]) -> None:
        """
        Args:
            scale_range: (low, high) of the rectangle's size relative to the image.
            shift_range: (x, y), twice the maximum shift of the center, as fractions of width and height.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        """Samples the scale, then the shift in x, then in y."""
        h, w = image.shape[:2]
        half = 0.5 * np.random.uniform(*self.scale_range) * np.array([w, h])
        shift = np.array(self.shift_range) * [w, h] * (np.array([np.random.rand(), np.random.rand()]) - 0.5)
        center = np.array([w, h]) * 0.5 + shift
        (x0, y0), (x1, y1) = center - half, center + half
        return ExtentTransform(src_rect=(x0, y0, x1, y1), output_size=(int(y1 - y0), int(x1 - x0)))


class RandomRotation(Augmentation):
    """Rotates counter-clockwise by a random angle."""

    def __init__(
        self,
        angle: float | Sequence[float],
        expand: bool = True,
        center: Sequence[tuple[float, float]] | None = None,
        sample_style: str = "range",
        interp: int | str | None = None,
    ) -> None:
        """
        Args:
            angle: [min, max] for "range", the angles to choose from for "choice", in degrees; or one angle.
            expand: make the output large enough for the whole rotated image.
            center: the same for the center, [[min_x, min_y], [max_x, max_y]] or a list of (x, y), as
                fractions of width and height; the image center when None.
            sample_style: "range" or "choice".
            interp: as for `RotationTransform`.
        """
        super().__init__()
        assert sample_style in ("range", "choice"), f"sample_style is range or choice, got {sample_style!r}"
        self.is_range = sample_style == "range"
        if isinstance(angle, (float, int)):
            angle = (angle, angle)
        if center is not None and isinstance(center[0], (float, int)):
            center = (center, center)
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        """Samples the angle, then the center."""
        h, w = image.shape[:2]
        center = None
        if self.is_range:
            angle = np.random.uniform(*self.angle)
            if self.center is not None:
                (x0, y0), (x1, y1) = self.center
                center = (np.random.uniform(x0, x1), np.random.uniform(y0, y1))
        else:
            angle = np.random.choice(self.angle)
            if self.center is not None:
                center = self.center[np.random.choice(len(self.center))]
        if angle % 360 == 0:
            return NoOpTransform()
        center = None if center is None else (w * center[0], h * center[1])
        return RotationTransform(h, w, angle, expand=self.expand, center=center, interp=self.interp)


class RandomApply(Augmentation):
    """Applies a transform or an augmentation with a probability."""

    def __init__(self, tfm_or_aug: Augmentation | Transform, prob: float = 0.5) -> None:
        """
        Args:
            tfm_or_aug: what to apply.
            prob: probability, in [0, 1].
        """
        super().__init__()
        self.aug = _as_augmentation(tfm_or_aug)
        assert 0.0 <= prob <= 1.0, f"prob must be in [0, 1], got {prob}"
        self.prob = prob

    def get_transform(self, *args: Any) -> Transform:
        """Samples whether to apply the transform, then takes that of the augmentation."""
        return self.aug.get_transform(*args) if self._rand_range() < self.prob else NoOpTransform()

    def __call__(self, aug_input: AugInput) -> Transform:
        """As `get_transform`, with the inputs that the augmentation needs; applies the result in place."""
        return self.aug(aug_input) if self._rand_range() < self.prob else NoOpTransform()
