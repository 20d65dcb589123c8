"""Trainer, checkpoints, hooks and what the tools share."""

from .checkpoint import CheckpointError, DistillCheckpointer
from .setup import ConfigError, argument_parser, load_config, run_tool, setup
from .teacher_eval import evaluate_teacher
from .train_step import NonFiniteLossError
from .trainer import DistillTrainer

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DistillCheckpointer",
    "DistillTrainer",
    "NonFiniteLossError",
    "argument_parser",
    "evaluate_teacher",
    "load_config",
    "run_tool",
    "setup",
]
