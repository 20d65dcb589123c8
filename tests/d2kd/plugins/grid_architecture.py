"""What d2kd must know of GridDetector."""

from d2kd.distillers import Prediction
from d2kd.modeling.architectures import Architecture, ClassCount, register_architecture


@register_architecture("GridDetector")
class GridArchitecture(Architecture):
    """GridDetector, of grid_detector.py."""

    CLASSES = (ClassCount("MODEL.GRID_DETECTOR.NUM_CLASSES"),)
    EVALUATOR_TYPES = ("coco",)
    LOSS_NORMALIZERS = ("usual_positives",)

    def predictions(self) -> list[Prediction]:
        """Returns the class logits and the sides of every level; one cell makes one prediction."""
        found = []
        for i, level in enumerate(self.model.levels):
            found.append(Prediction(f"class_layer@{i}", "class_logits", "anchor", level, activation="sigmoid"))
            unit = {"unit of the sides (the stride)": self.model.strides[i]}
            found.append(Prediction(f"side_layer@{i}", "box_deltas", "anchor", level, requires=unit))
        return found
