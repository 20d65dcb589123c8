"""From a model and images to predictions, pictures and files; whatever the task."""

from .files import ResultFiles
from .inputs import ImageFile, InputError, Video, find_inputs
from .panoptic import PanopticMap
from .predictor import Prediction, Predictor
from .run import Summary, predict_files

__all__ = [
    "ImageFile",
    "InputError",
    "PanopticMap",
    "Prediction",
    "Predictor",
    "ResultFiles",
    "Summary",
    "Video",
    "find_inputs",
    "predict_files",
]
