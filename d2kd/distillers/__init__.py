"""Distillation methods: features in, named losses out. One file a method."""

from .base import DISTILLERS, Distiller, TapPair
from .feature_mimic import FeatureMimic
from .masked_generative import MaskedGenerative

__all__ = ["DISTILLERS", "Distiller", "FeatureMimic", "MaskedGenerative", "TapPair"]
