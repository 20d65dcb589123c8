"""Pictures: training curves, inputs, features, what models find or say side by side, what a masked teacher sees."""

from d2kd.visualization.classifications import classification_sheet, differing, read_classifications
from d2kd.visualization.curves import TrainingLog, read_training_log, training_curves
from d2kd.visualization.detections import detection_grid, read_predictions
from d2kd.visualization.features import FeatureRow, feature_picture
from d2kd.visualization.inputs import input_sheet, network_image
from d2kd.visualization.label_maps import NO_LABEL, LabelPredictions, label_map_grid, read_label_predictions
from d2kd.visualization.masking import kept_picture, masking_plot, sheet
from d2kd.visualization.panoptic import panoptic_picture
from d2kd.visualization.points import draw_points
from d2kd.visualization.predictions import prediction_picture
from d2kd.visualization.trade_off import Trade, trade_off

__all__ = [
    "NO_LABEL",
    "FeatureRow",
    "LabelPredictions",
    "Trade",
    "TrainingLog",
    "classification_sheet",
    "detection_grid",
    "differing",
    "draw_points",
    "feature_picture",
    "input_sheet",
    "kept_picture",
    "label_map_grid",
    "masking_plot",
    "network_image",
    "panoptic_picture",
    "prediction_picture",
    "read_classifications",
    "read_label_predictions",
    "read_predictions",
    "read_training_log",
    "sheet",
    "trade_off",
    "training_curves",
]
