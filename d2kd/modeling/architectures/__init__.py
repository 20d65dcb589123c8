"""What d2kd knows of architectures: one file a family of models."""

from .base import (
    ARCHITECTURES,
    Architecture,
    ClassLayer,
    HeadBranch,
    HeadLayer,
    NumClassesKey,
    architecture_class,
    architecture_of,
    check_test_augmentation,
    num_classes,
    output_shapes,
    register_architecture,
    warn_if_unknown,
)
from .build import ArchitectureError, build_network
from .classifier import ImageClassifier
from .dense_detector import DenseDetector
from .gfl import GFL
from .rcnn import GeneralizedRCNN, is_region_tap
from .reppoints import RepPoints
from .semantic_segmentor import SemanticSegmentor
from .solo import SOLO

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "ArchitectureError",
    "ClassLayer",
    "NumClassesKey",
    "DenseDetector",
    "GFL",
    "GeneralizedRCNN",
    "HeadBranch",
    "HeadLayer",
    "ImageClassifier",
    "RepPoints",
    "SOLO",
    "SemanticSegmentor",
    "architecture_class",
    "architecture_of",
    "build_network",
    "check_test_augmentation",
    "is_region_tap",
    "num_classes",
    "output_shapes",
    "register_architecture",
    "warn_if_unknown",
]
