"""The pass over the whole image."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from detectron2.utils import comm

from ..taps import FeatureTaps
from ..teacher import BatchedInputs, Teacher
from .acceleration import Acceleration, report_drift
from .base import TEACHER_PASSES, TeacherFeatures, TeacherPass


@TEACHER_PASSES.register()
class DensePass(TeacherPass):
    """Runs the teacher over the whole image, as far as its deepest tap, before the student."""

    def __init__(self, teacher: Teacher, taps: Iterable[str], acceleration: Acceleration | None = None) -> None:
        """
        Args:
            teacher, taps: as in the base class.
            acceleration: what makes it faster, by default nothing.

        Raises:
            TapError: the teacher has no such feature.
        """
        super().__init__(teacher, taps)
        self._faster = (acceleration or Acceleration()).of(teacher, self.taps)
        self._taps = FeatureTaps(self._faster.model, self.taps)
        self._unchecked = self._faster is not teacher or teacher.precision != torch.float32

    @property
    def networks(self) -> list[nn.Module]:
        """The teacher's network, and what runs in its place."""
        return [self.teacher.model, self._faster.model]

    def __call__(
        self, batched_inputs: BatchedInputs, guidance: Any = None, dense: Mapping[str, Tensor] | None = None
    ) -> TeacherFeatures:
        """As in the base class; only the images are needed."""
        return self.direct(batched_inputs)

    def direct(self, batched_inputs: BatchedInputs) -> TeacherFeatures:
        """Returns what the teacher gives for a batch when it runs, whatever is stored of it.

        The first time, faster features are checked.
        """
        torch.compiler.cudagraph_mark_step_begin()  # graphs may write over what the last call has returned
        features = self._faster.record(batched_inputs, self._taps)
        if self._unchecked:
            self._unchecked = False
            if comm.is_main_process():
                exact = self.teacher.in_float32()
                report_drift(features, exact.record(batched_inputs, FeatureTaps(exact.model, self.taps)))
        return TeacherFeatures(features, {})
