"""d2kd: knowledge distillation for dense prediction on Detectron2."""

from d2kd.runtime import RUNTIME, Runtime

__version__ = "0.1.0"

__all__ = ["RUNTIME", "Runtime", "__version__"]
