"""Pure tensor functions and small modules; they import torch only."""

from .align import AlignmentError, TapShape, align_resolution, build_aligner, check_alignable
from .divergence import binary_divergence, soft_count, softmax_divergence, spatial_divergence
from .losses import at_least_float32, check_reduction, squared_error
from .masks import RandomMasks, keep_mask
from .normalize import normalize, standardize

__all__ = [
    "AlignmentError",
    "RandomMasks",
    "TapShape",
    "align_resolution",
    "at_least_float32",
    "binary_divergence",
    "build_aligner",
    "check_alignable",
    "check_reduction",
    "keep_mask",
    "normalize",
    "soft_count",
    "softmax_divergence",
    "spatial_divergence",
    "squared_error",
    "standardize",
]
