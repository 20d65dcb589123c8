"""Pictures: training curves, and detections side by side."""

from d2kd.visualization.curves import TrainingLog, read_training_log, training_curves
from d2kd.visualization.detections import detection_grid, read_predictions

__all__ = ["TrainingLog", "detection_grid", "read_predictions", "read_training_log", "training_curves"]
