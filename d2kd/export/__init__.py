"""From a trained model to a file that runs without d2kd: ONNX, TorchScript, or weights and YAML of plain Detectron2."""

from . import classifier, dense_detector, rcnn, segmentor, solo
from .base import EXPORTS, Exported, ExportError, exported, register_export
from .exporting import export_model
from .formats import ABOUT, SUFFIXES, require_packages
from .images import read_folder
from .plain import export_plain
from .verification import TOLERANCES, Agreement

__all__ = [
    "ABOUT",
    "Agreement",
    "EXPORTS",
    "ExportError",
    "Exported",
    "SUFFIXES",
    "TOLERANCES",
    "classifier",
    "dense_detector",
    "export_model",
    "export_plain",
    "exported",
    "rcnn",
    "read_folder",
    "register_export",
    "require_packages",
    "segmentor",
    "solo",
]
