"""The run: set-up and launching, the trainer and its step, checkpoints, evaluation, hooks."""

from d2kd.arguments import add_import_argument, add_run_arguments, argument_parser

from .check import check_run
from .checkpoint import CheckpointError, DistillCheckpointer, load_start
from .evaluation import evaluate_student, evaluate_teacher, evaluate_teacher_and_student
from .hooks import calibrate
from .launching import launch_tool, run_tool
from .optimizer import build_optimizer
from .resumable_trainer import ResumableTrainer
from .run_folder import FolderError
from .setup import load_config, log_runtime, setup, setup_training
from .train_step import NonFiniteLossError
from .trainer import DistillTrainer

__all__ = [
    "CheckpointError",
    "DistillCheckpointer",
    "DistillTrainer",
    "FolderError",
    "NonFiniteLossError",
    "ResumableTrainer",
    "add_import_argument",
    "add_run_arguments",
    "argument_parser",
    "build_optimizer",
    "calibrate",
    "check_run",
    "evaluate_student",
    "evaluate_teacher",
    "evaluate_teacher_and_student",
    "launch_tool",
    "load_config",
    "load_start",
    "log_runtime",
    "run_tool",
    "setup",
    "setup_training",
]
