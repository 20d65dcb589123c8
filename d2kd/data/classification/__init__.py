"""Image classification: datasets of one label an image, their augmentation, and mixed batches."""

from .builtin import register_builtin, register_source
from .check import ClassificationSummary, check_classification
from .cub import Cub200
from .folders import ImageFolders, same_split
from .mapper import ClassificationMapper, require_pairs
from .mixing import BatchMix, build_mix
from .samplers import RepeatAugmentation, repeated_length
from .source import ClassificationSource

__all__ = [
    "BatchMix",
    "ClassificationMapper",
    "ClassificationSource",
    "ClassificationSummary",
    "Cub200",
    "ImageFolders",
    "RepeatAugmentation",
    "build_mix",
    "check_classification",
    "register_builtin",
    "register_source",
    "repeated_length",
    "require_pairs",
    "same_split",
]
