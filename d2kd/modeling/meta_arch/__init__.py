"""Architectures that Detectron2 lacks, or has no YAML for; importing registers them."""

from .fcos import FCOS
from .gfl import GFL
from .image_classifier import ImageClassifier
from .reppoints import RepPoints
from .segmentor import Segmentor
from .solo import SOLO

__all__ = ["FCOS", "GFL", "SOLO", "ImageClassifier", "RepPoints", "Segmentor"]
