"""Taps: features of any Detectron2 model by address; how they are recorded, what is known of them, and their pairs."""

from .address import Tap, TapError, is_in_backbone, last_norm, resolve_tap, tap_names
from .head_rests import with_rests
from .pairing import image_side, no_shared_output, pairs_of_methods, shared_levels, shared_predictions
from .recording import FeatureTaps, evaluation_mode
from .shapes import describe_taps

__all__ = [
    "FeatureTaps",
    "Tap",
    "TapError",
    "describe_taps",
    "evaluation_mode",
    "image_side",
    "is_in_backbone",
    "last_norm",
    "no_shared_output",
    "pairs_of_methods",
    "resolve_tap",
    "shared_levels",
    "shared_predictions",
    "tap_names",
    "with_rests",
]
