"""Architectures that Detectron2 lacks, or has no YAML for; importing registers them."""

from .fcos import FCOS
from .image_classifier import ImageClassifier
from .reppoints import RepPoints

__all__ = ["FCOS", "ImageClassifier", "RepPoints"]
