"""d2kd: knowledge distillation for dense prediction on Detectron2.

Importing it makes the name `detectron2` resolve, and takes milliseconds: what it offers is imported when it is asked
for. D2kd's backbones, architectures and heads are in Detectron2's registries as soon as `detectron2.modeling` is
imported, its methods and keys as soon as a configuration or model is made (see `d2kd.runtime`).
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from d2kd.runtime import Runtime, prepare_runtime

if TYPE_CHECKING:
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
    from d2kd.config import add_distill_config
    from d2kd.distillers import DISTILLERS, Distiller
    from d2kd.modeling import DistilledModel
    from d2kd.prediction import Predictor
    from d2kd.runtime import RUNTIME

__version__ = "0.2.0.dev0"

prepare_runtime()

#: Names of this package, by the module that has them; `TYPE_CHECKING` and `__all__` name them too.
_LAZY = {
    "DISTILLERS": "d2kd.distillers",
    "DistilledModel": "d2kd.modeling",
    "Distiller": "d2kd.distillers",
    "Predictor": "d2kd.prediction",
    "RUNTIME": "d2kd.runtime",
    "TrainingResult": "d2kd.api",
    "add_distill_config": "d2kd.config",
    "build_distilled_model": "d2kd.api",
    "build_optimizer": "d2kd.api",
    "build_train_loader": "d2kd.api",
    "calibrate": "d2kd.api",
    "distill": "d2kd.api",
    "evaluate": "d2kd.api",
    "load_config": "d2kd.api",
    "train": "d2kd.api",
}

__all__ = [
    "DISTILLERS",
    "RUNTIME",
    "DistilledModel",
    "Distiller",
    "Predictor",
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


def __getattr__(name: str) -> Any:
    """Imports what a name of `_LAZY` stands for, or a submodule (PEP 562)."""
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
