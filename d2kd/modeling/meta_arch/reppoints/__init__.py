"""META_ARCHITECTURE "RepPoints" (arXiv 1904.11490): a detector whose objects are sets of points."""

from .assigners import BACKGROUND, IGNORED, assign_by_distance, assign_by_overlap
from .head import PointMaps, RepPointsHead
from .model import RepPoints
from .points import TRANSFORMS, MinMaxTransform, MomentTransform, build_transform
from .targets import StageTargets, stage_targets

__all__ = [
    "BACKGROUND",
    "IGNORED",
    "TRANSFORMS",
    "MinMaxTransform",
    "MomentTransform",
    "PointMaps",
    "RepPoints",
    "RepPointsHead",
    "StageTargets",
    "assign_by_distance",
    "assign_by_overlap",
    "build_transform",
    "stage_targets",
]
