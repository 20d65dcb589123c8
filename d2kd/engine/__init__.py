"""Trainer, checkpoints, hooks and what the tools share."""

from .checkpoint import CheckpointError, DistillCheckpointer
from .launching import launch_tool, run_tool
from .setup import ConfigError, argument_parser, load_config, log_runtime, setup
from .teacher_eval import evaluate_teacher
from .token_learning import TokenTrainer
from .train_step import NonFiniteLossError
from .trainer import DistillTrainer

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DistillCheckpointer",
    "DistillTrainer",
    "NonFiniteLossError",
    "TokenTrainer",
    "argument_parser",
    "evaluate_teacher",
    "launch_tool",
    "load_config",
    "log_runtime",
    "run_tool",
    "setup",
]
