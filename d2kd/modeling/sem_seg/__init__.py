"""Heads of segmentors, and how they predict: DeepLabV3, PSPNet, sliding windows, test-time augmentation."""

from .aspp import ASPP
from .auxiliary import AuxiliaryHead
from .head import ASPPHead, PixelHead, PSPHead
from .losses import pixel_accuracy, pixel_cross_entropy, resize_logits
from .pyramid_pooling import PyramidPooling
from .sliding_window import SlidingWindows
from .test_augmentation import SegmentorWithTTA

__all__ = [
    "ASPP",
    "ASPPHead",
    "AuxiliaryHead",
    "PSPHead",
    "PixelHead",
    "PyramidPooling",
    "SegmentorWithTTA",
    "SlidingWindows",
    "pixel_accuracy",
    "pixel_cross_entropy",
    "resize_logits",
]
