"""The run: set-up and launching, the trainer and its step, checkpoints, evaluation, hooks."""

from .checkpoint import CheckpointError, DistillCheckpointer
from .evaluation import evaluate_student, evaluate_teacher
from .launching import launch_tool, run_tool
from .resumable_trainer import ResumableTrainer
from .setup import add_import_argument, argument_parser, load_config, log_runtime, setup
from .train_step import NonFiniteLossError
from .trainer import DistillTrainer

__all__ = [
    "CheckpointError",
    "DistillCheckpointer",
    "DistillTrainer",
    "NonFiniteLossError",
    "ResumableTrainer",
    "add_import_argument",
    "argument_parser",
    "evaluate_student",
    "evaluate_teacher",
    "launch_tool",
    "load_config",
    "log_runtime",
    "run_tool",
    "setup",
]
