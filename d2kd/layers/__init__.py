"""Pure tensor functions that several methods share; they import torch only."""

from .align import align_resolution, align_validity
from .losses import NORMALIZATIONS, REDUCTIONS, normalize, squared_error, standardize, upcast_half
from .masks import MASK_KINDS, RandomMasks, keep_mask

__all__ = [
    "MASK_KINDS",
    "NORMALIZATIONS",
    "REDUCTIONS",
    "RandomMasks",
    "align_resolution",
    "align_validity",
    "keep_mask",
    "normalize",
    "squared_error",
    "standardize",
    "upcast_half",
]
