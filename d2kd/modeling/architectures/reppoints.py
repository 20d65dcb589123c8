"""RepPoints: class logits and two sets of points at every location."""

from d2kd.distillers import Prediction

from .base import NumClassesKey, register_architecture
from .dense_detector import DenseDetector


@register_architecture("RepPoints")
class RepPoints(DenseDetector):
    """RepPoints (arXiv 1904.11490)."""

    CLASSES = (NumClassesKey("MODEL.REPPOINTS.NUM_CLASSES"),)
    SCORE_THRESHOLD = "MODEL.REPPOINTS.SCORE_THRESH_TEST"
    LOSS_NORMALIZERS = ()

    def predictions(self) -> list[Prediction]:
        """Returns the class logits of every level, the corrections of the points, and the first points.

        These are the outputs of the layers: refined points are the first ones plus the correction.
        """
        where = {"locations of predictions (MODEL.META_ARCHITECTURE)": "multiples of the stride"}
        points = {
            "points of an object (MODEL.REPPOINTS.NUM_POINTS)": self.model.head.num_points,
            "box of the points (MODEL.REPPOINTS.TRANSFORM)": _words(self.model.point_transform),
        }
        levels = list(enumerate(self.model.head_in_features))
        return [
            *(
                Prediction(f"head.cls_score@{i}", "class_logits", "anchor", p, "sigmoid", requires=where)
                for i, p in levels
            ),
            *(
                Prediction(f"head.{layer}@{i}", "box_deltas", "anchor", (level, stage), requires=points)
                for layer, stage in (("refined_points", "correction"), ("initial_points", "first points"))
                for i, level in levels
            ),
        ]


def _words(transform: object) -> str:
    first = getattr(transform, "first", None)
    return type(transform).__name__ + (f" of {first}" if first else "")
