"""Pure tensor functions and small modules; they import torch only."""

from .align import AlignmentError, TapShape, align_resolution, build_aligner, check_alignable
from .losses import check_reduction, squared_error
from .masks import RandomMasks, keep_mask
from .normalize import normalize, standardize

__all__ = [
    "AlignmentError",
    "RandomMasks",
    "TapShape",
    "align_resolution",
    "build_aligner",
    "check_alignable",
    "check_reduction",
    "keep_mask",
    "normalize",
    "squared_error",
    "standardize",
]
