"""Taps, teacher, inheriting and the distilled model."""

from . import backbone, meta_arch  # registers them
from .architecture import ArchitectureError, build_network
from .balance import BalanceError, GradientBalance
from .build import MethodError, build_distilled_model, inherit_from_teacher, is_distillation
from .distilled_model import DistilledModel
from .inherit import InheritReport, inherit
from .num_classes import num_classes
from .taps import FeatureTaps, TapError
from .teacher import Teacher, TeacherError, load_strictly, load_teacher, teacher_config
from .token_learner import LevelMasks, TokenLearner

__all__ = [
    "ArchitectureError",
    "BalanceError",
    "DistilledModel",
    "FeatureTaps",
    "GradientBalance",
    "InheritReport",
    "LevelMasks",
    "MethodError",
    "TapError",
    "Teacher",
    "TeacherError",
    "TokenLearner",
    "backbone",
    "build_distilled_model",
    "build_network",
    "inherit",
    "inherit_from_teacher",
    "is_distillation",
    "load_strictly",
    "load_teacher",
    "meta_arch",
    "num_classes",
    "teacher_config",
]
