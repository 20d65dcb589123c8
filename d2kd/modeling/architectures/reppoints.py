"""RepPoints: class logits and two sets of points at every location."""

from torch import nn

from d2kd.distillers import Prediction

from .base import NumClassesKey, register_architecture
from .dense_detector import DenseDetector


@register_architecture("RepPoints")
class RepPoints(DenseDetector):
    """RepPoints (arXiv 1904.11490)."""

    CLASSES = (NumClassesKey("MODEL.REPPOINTS.NUM_CLASSES"),)
    SCORE_THRESHOLD = "MODEL.REPPOINTS.SCORE_THRESH_TEST"
    LOSS_NORMALIZERS = ()

    def probe_size(self) -> int:
        """As in the base class; group norms of one channel a group refuse the one pixel that P7 would have."""
        norms = [module for module in self.model.modules() if isinstance(module, nn.GroupNorm)]
        return 256 if any(norm.num_channels == norm.num_groups for norm in norms) else super().probe_size()

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
