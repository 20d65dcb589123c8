"""The pass over the whole image."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..taps import FeatureTaps
from ..teacher import BatchedInputs, Teacher
from .base import TEACHER_PASSES, TeacherFeatures, TeacherPass


@TEACHER_PASSES.register()
class DensePass(TeacherPass):
    """Runs the teacher over the whole image, as far as its deepest tap, before the student."""

    def __init__(self, teacher: Teacher, taps: Any) -> None:
        """
        Raises:
            TapError: the teacher has no such feature.
        """
        super().__init__(teacher, taps)
        self._taps = FeatureTaps(teacher.model, self.taps)

    def __call__(
        self, batched_inputs: BatchedInputs, guidance: Any = None, dense: Mapping[str, Tensor] | None = None
    ) -> TeacherFeatures:
        """As in the base class; only the images are needed."""
        return self.direct(batched_inputs)

    def direct(self, batched_inputs: BatchedInputs) -> TeacherFeatures:
        """Returns what the teacher gives for a batch when it runs, whatever is stored of it."""
        return TeacherFeatures(self.teacher.record(batched_inputs, self._taps), {})
