"""Architectures that Detectron2 lacks, or has no YAML for; importing registers them."""

from .fcos import FCOS
from .image_classifier import ImageClassifier
from .reppoints import RepPoints
from .segmentor import Segmentor
from .solo import SOLO

__all__ = ["FCOS", "SOLO", "ImageClassifier", "RepPoints", "Segmentor"]
