"""Distillation methods: features in, named losses out. One file a method, or a folder where it has parts of its own."""

from .base import AUTO, DISTILLERS, CalibrationRequest, Distiller, FeatureDistiller, FeatureMaps
from .channel_matching import ChannelMatching
from .cross_kd import CrossKD
from .feature_mimic import FeatureMimic
from .head_regression import HeadRegression
from .ld import LD
from .logit_kd import LogitKD
from .masked_generative import MaskedGenerative
from .predictions import PredictionDistiller, check_same_meaning
from .receptive_tokens import ReceptiveTokens
from .taps import AlignmentError, HeadRest, NormAffine, Prediction, TapInfo, TapPair, build_aligner
from .weight_schedule import WeightSchedule, scale_schedules, weight_schedules

__all__ = [
    "AUTO",
    "DISTILLERS",
    "AlignmentError",
    "CalibrationRequest",
    "ChannelMatching",
    "CrossKD",
    "Distiller",
    "FeatureDistiller",
    "FeatureMaps",
    "FeatureMimic",
    "HeadRegression",
    "HeadRest",
    "LD",
    "LogitKD",
    "MaskedGenerative",
    "NormAffine",
    "Prediction",
    "PredictionDistiller",
    "ReceptiveTokens",
    "TapInfo",
    "TapPair",
    "WeightSchedule",
    "build_aligner",
    "check_same_meaning",
    "scale_schedules",
    "weight_schedules",
]
