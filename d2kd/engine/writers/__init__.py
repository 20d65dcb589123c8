"""Writers of scalars beside Detectron2's: the methods' lines in the log, and Weights & Biases."""

from .distill_printer import DistillPrinter
from .wandb_writer import WandbWriter, check_wandb

__all__ = ["DistillPrinter", "WandbWriter", "check_wandb"]
