"""Hooks: what happens between the steps of a training. One of your own: `DistillTrainer.extra_hooks` returns it."""

from .best import BestCheckpoint, EarlyStop
from .calibration import CalibrationHook, calibrate
from .evaluation import EvaluationHook
from .masking import MaskingPictures, build_masking_pictures
from .progress import ProgressWriter
from .run import CheckpointHook, InterruptHook, ResultWriter, TeacherTime, Terminated, WallTime

__all__ = [
    "BestCheckpoint",
    "CalibrationHook",
    "CheckpointHook",
    "EarlyStop",
    "EvaluationHook",
    "InterruptHook",
    "MaskingPictures",
    "ProgressWriter",
    "ResultWriter",
    "TeacherTime",
    "Terminated",
    "WallTime",
    "build_masking_pictures",
    "calibrate",
]
