"""Hooks: what happens between the steps of a training. One of your own: `DistillTrainer.extra_hooks` returns it."""

from .best import BestCheckpoint, EarlyStop
from .calibration import CalibrationHook
from .run import CheckpointHook, InterruptHook, ResultWriter, WallTime

__all__ = [
    "BestCheckpoint",
    "CalibrationHook",
    "CheckpointHook",
    "EarlyStop",
    "InterruptHook",
    "ResultWriter",
    "WallTime",
]
