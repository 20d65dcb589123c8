"""d2kd: knowledge distillation for dense prediction on Detectron2.

Importing it makes the name `detectron2` resolve, and registers d2kd's backbones, architectures and methods.
"""

from d2kd.runtime import RUNTIME, Runtime

# isort: split
from d2kd.config import add_distill_config
from d2kd.distillers import DISTILLERS, Distiller
from d2kd.modeling import DistilledModel

# isort: split
from d2kd.api import (
    TrainingResult,
    build_distilled_model,
    build_optimizer,
    build_train_loader,
    calibrate,
    distill,
    evaluate,
    load_config,
    train,
)

__version__ = "0.2.0.dev0"

__all__ = [
    "DISTILLERS",
    "RUNTIME",
    "DistilledModel",
    "Distiller",
    "Runtime",
    "TrainingResult",
    "__version__",
    "add_distill_config",
    "build_distilled_model",
    "build_optimizer",
    "build_train_loader",
    "calibrate",
    "distill",
    "evaluate",
    "load_config",
    "train",
]
