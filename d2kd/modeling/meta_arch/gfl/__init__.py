"""META_ARCHITECTURE "GFL" (arXiv 2006.04388): a detector that predicts how certain each side of a box is."""

from .assigner import BACKGROUND, assign_by_statistics
from .distribution import SIDES, as_box, box_distances, distribution_focal_loss, expected_distances
from .head import GFLHead
from .model import GFL

__all__ = [
    "BACKGROUND",
    "GFL",
    "GFLHead",
    "SIDES",
    "as_box",
    "assign_by_statistics",
    "box_distances",
    "distribution_focal_loss",
    "expected_distances",
]
