"""Pictures: training curves, and what models find or say side by side."""

from d2kd.visualization.classifications import classification_sheet, differing, read_classifications
from d2kd.visualization.curves import TrainingLog, read_training_log, training_curves
from d2kd.visualization.detections import detection_grid, read_predictions

__all__ = [
    "TrainingLog",
    "classification_sheet",
    "detection_grid",
    "differing",
    "read_classifications",
    "read_predictions",
    "read_training_log",
    "training_curves",
]
