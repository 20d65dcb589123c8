"""Semantic segmentation: folders of images and label maps, and how images are varied in training."""

from .augmentation import PhotometricDistortion, build_augmentations
from .label_maps import LabelMaps, ignored_label, label_suffix

__all__ = [
    "LabelMaps",
    "PhotometricDistortion",
    "build_augmentations",
    "ignored_label",
    "label_suffix",
]
