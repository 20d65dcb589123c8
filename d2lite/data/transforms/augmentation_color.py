"""Augmentations that change colors and keep the geometry."""

from typing import Any

import numpy as np
from fvcore.transforms.transform import BlendTransform, Transform

from d2lite.data.transforms.augmentation import Augmentation

__all__ = ["RandomBrightness", "RandomContrast", "RandomLighting", "RandomSaturation"]


class _RandomBlend(Augmentation):
    """Blends the image with a degenerate version of it; a weight of 1 keeps the image, above 1 extrapolates."""

    def __init__(self, intensity_min: float, intensity_max: float) -> None:
        """
        Args:
            intensity_min, intensity_max: range of the image's weight.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        """Samples the weight."""
        weight = np.random.uniform(self.intensity_min, self.intensity_max)
        return BlendTransform(src_image=self._degenerate(image), src_weight=1 - weight, dst_weight=weight)

    def _degenerate(self, image: np.ndarray) -> Any:
        raise NotImplementedError


class RandomContrast(_RandomBlend):
    """Blends with the image's mean value."""

    def _degenerate(self, image: np.ndarray) -> float:
        return image.mean()


class RandomBrightness(_RandomBlend):
    """Blends with black."""

    def _degenerate(self, image: np.ndarray) -> float:
        return 0


class RandomSaturation(_RandomBlend):
    """Blends with the gray image (ITU-R BT.601 weights); expects RGB."""

    def _degenerate(self, image: np.ndarray) -> np.ndarray:
        assert image.shape[-1] == 3, f"RandomSaturation needs RGB images, got shape {image.shape}"
        return image.dot([0.299, 0.587, 0.114])[:, :, np.newaxis]


class RandomLighting(Augmentation):
    """Shifts the color along ImageNet's principal components; expects RGB.

    Source: Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks", section 4.1.
    """

    def __init__(self, scale: float) -> None:
        """
        Args:
            scale: standard deviation of the weight of each component.
        """
        super().__init__()
        self._init(locals())
        self.eigen_vecs = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
        self.eigen_vals = np.array((0.2175, 0.0188, 0.0045))

    def get_transform(self, image: np.ndarray) -> Transform:
        """Samples three weights."""
        assert image.shape[-1] == 3, f"RandomLighting needs RGB images, got shape {image.shape}"
        weights = np.random.normal(0.0, self.scale, 3)
        shift = self.eigen_vecs.dot(weights * self.eigen_vals)
        return BlendTransform(src_image=shift, src_weight=1.0, dst_weight=1.0)
