"""How the teacher computes features: over the whole image, on the student's regions, or as registered."""

from .acceleration import Acceleration
from .base import TEACHER_PASSES, TeacherFeatures, TeacherPass
from .build import TeacherPasses, build_passes
from .cached import CachedDensePass
from .clock import TeacherClock
from .dense import DensePass
from .masked import MaskedTeacher
from .regions import RegionPass

__all__ = [
    "TEACHER_PASSES",
    "Acceleration",
    "CachedDensePass",
    "DensePass",
    "MaskedTeacher",
    "RegionPass",
    "TeacherClock",
    "TeacherFeatures",
    "TeacherPass",
    "TeacherPasses",
    "build_passes",
]
