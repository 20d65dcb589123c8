"""Pure tensor functions that several methods share; they import torch only."""

from .align import align_resolution, align_validity, rescale
from .boxes import generalized_iou, paired_iou
from .focal import sigmoid_focal_loss, soft_label_focal_loss
from .losses import NORMALIZATIONS, REDUCTIONS, normalize, squared_error, standardize, standardized_error, upcast_half
from .masks import MASK_KINDS, RandomMasks, keep_mask, own_or_runs_seed
from .position_weights import mask_weights, object_weights, weighted_error
from .processes import mean_over_processes
from .similarity import linear_cka, principal_axes, ridge_weights, standardize_channels
from .softplus import softplus
from .tokens import attention_saliency, gather_tokens, ranks_of, resample_saliency, scatter_tokens

__all__ = [
    "MASK_KINDS",
    "NORMALIZATIONS",
    "REDUCTIONS",
    "RandomMasks",
    "align_resolution",
    "align_validity",
    "attention_saliency",
    "gather_tokens",
    "generalized_iou",
    "keep_mask",
    "linear_cka",
    "mask_weights",
    "mean_over_processes",
    "normalize",
    "object_weights",
    "paired_iou",
    "own_or_runs_seed",
    "principal_axes",
    "ranks_of",
    "resample_saliency",
    "rescale",
    "ridge_weights",
    "scatter_tokens",
    "sigmoid_focal_loss",
    "soft_label_focal_loss",
    "softplus",
    "squared_error",
    "standardize",
    "standardize_channels",
    "standardized_error",
    "upcast_half",
    "weighted_error",
]
