"""Heads of segmentors that Detectron2 lacks, and how they predict; importing registers them."""

from .aspp import ASPP
from .auxiliary import AuxiliaryHead
from .head import ASPPHead, PixelHead, PSPHead
from .linear import LinearSemSegHead
from .losses import pixel_accuracy, pixel_cross_entropy, resize_logits
from .pyramid_pooling import PyramidPooling
from .sliding_window import SlidingWindows
from .test_augmentation import SegmentorWithTTA

__all__ = [
    "ASPP",
    "ASPPHead",
    "AuxiliaryHead",
    "LinearSemSegHead",
    "PSPHead",
    "PixelHead",
    "PyramidPooling",
    "SegmentorWithTTA",
    "SlidingWindows",
    "pixel_accuracy",
    "pixel_cross_entropy",
    "resize_logits",
]
