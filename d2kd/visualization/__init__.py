"""Pictures: training curves, what models find or say side by side, what masking a teacher costs."""

from d2kd.visualization.classifications import classification_sheet, differing, read_classifications
from d2kd.visualization.curves import TrainingLog, read_training_log, training_curves
from d2kd.visualization.detections import detection_grid, read_predictions
from d2kd.visualization.masking import masking_plot
from d2kd.visualization.points import draw_points

__all__ = [
    "TrainingLog",
    "classification_sheet",
    "detection_grid",
    "differing",
    "draw_points",
    "masking_plot",
    "read_classifications",
    "read_predictions",
    "read_training_log",
    "training_curves",
]
