"""Hooks: what happens between the steps of a training. One of your own: `DistillTrainer.extra_hooks` returns it."""

from .best import BestCheckpoint, EarlyStop
from .calibration import CalibrationHook
from .evaluation import EvaluationHook
from .run import CheckpointHook, InterruptHook, ResultWriter, Terminated, WallTime

__all__ = [
    "BestCheckpoint",
    "CalibrationHook",
    "CheckpointHook",
    "EarlyStop",
    "EvaluationHook",
    "InterruptHook",
    "ResultWriter",
    "Terminated",
    "WallTime",
]
