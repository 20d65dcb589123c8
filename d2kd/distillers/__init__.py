"""Distillation methods: features in, named losses out. One file a method."""

from .base import DISTILLERS, Distiller, NormAffine, TapPair
from .channel_matching import ChannelMatching
from .feature_mimic import FeatureMimic
from .head_regression import HeadRegression
from .logit_kd import LogitKD
from .masked_generative import MaskedGenerative
from .receptive_tokens import ReceptiveTokens
from .token_file import TokenFile, TokenFileError

__all__ = [
    "DISTILLERS",
    "ChannelMatching",
    "Distiller",
    "FeatureMimic",
    "HeadRegression",
    "LogitKD",
    "MaskedGenerative",
    "NormAffine",
    "ReceptiveTokens",
    "TapPair",
    "TokenFile",
    "TokenFileError",
]
