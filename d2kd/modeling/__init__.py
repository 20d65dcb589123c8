"""Architectures, taps, the teacher and its passes, and the distilled model."""

from . import backbone, library_weights, meta_arch, sem_seg  # registers them
from .architectures import ArchitectureError, build_network, num_classes
from .balance import BalanceError, GradientBalance
from .build import MethodError, build_distilled_model, build_teacher, initialize_student, is_distillation, plan_student
from .distilled_model import DistilledModel
from .init_from_teacher import InitializationReport, init_from_teacher
from .strict_loading import StrictLoadingError, load_strictly
from .taps import FeatureTaps, TapError, evaluation_mode
from .teacher import Teacher, TeacherError, load_teacher, read_teacher_config, teacher_config

__all__ = [
    "ArchitectureError",
    "BalanceError",
    "DistilledModel",
    "FeatureTaps",
    "GradientBalance",
    "InitializationReport",
    "MethodError",
    "StrictLoadingError",
    "TapError",
    "Teacher",
    "TeacherError",
    "backbone",
    "build_distilled_model",
    "build_network",
    "build_teacher",
    "evaluation_mode",
    "init_from_teacher",
    "initialize_student",
    "is_distillation",
    "library_weights",
    "load_strictly",
    "load_teacher",
    "meta_arch",
    "num_classes",
    "plan_student",
    "read_teacher_config",
    "sem_seg",
    "teacher_config",
]
