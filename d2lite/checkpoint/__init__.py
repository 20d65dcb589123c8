"""Saving and loading checkpoints; files from outside are read without executing code."""

from fvcore.common.checkpoint import PeriodicCheckpointer

from d2lite.checkpoint.checkpointer import Checkpointer
from d2lite.checkpoint.detection_checkpoint import DetectionCheckpointer
from d2lite.checkpoint.safe_load import InvalidCheckpointError

__all__ = ["Checkpointer", "DetectionCheckpointer", "InvalidCheckpointError", "PeriodicCheckpointer"]
