"""A pass of a stranger: the teacher's maps where the student's own map is strong, and at some random cells."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from d2kd.distillers import TapPair
from d2kd.layers import RandomMasks
from d2kd.modeling.taps import FeatureTaps
from d2kd.modeling.teacher import BatchedInputs, Teacher
from d2kd.modeling.teacher_passes import TEACHER_PASSES, TeacherFeatures, TeacherPass
from detectron2.config import CfgNode
from detectron2.utils import comm


@TEACHER_PASSES.register()
class SalientPass(TeacherPass):
    """Knows the teacher's maps at half of the cells only: it runs after the student, and looks where that looked."""

    needs_student = True
    sparse = True

    def __init__(self, student: nn.Module, teacher: Teacher, pairs: Iterable[TapPair]) -> None:
        pairs = list(pairs)
        super().__init__(teacher, [pair.teacher.name for pair in pairs])
        self.student_of = {pair.teacher.name: pair.student.name for pair in pairs}
        self.student_taps = FeatureTaps(student, list(self.student_of.values()))
        self.masks = RandomMasks(seed=5, stream=comm.get_rank())

    @classmethod
    def from_config(cls, cfg: CfgNode, student: nn.Module, teacher: Teacher, pairs: Iterable[TapPair]) -> "SalientPass":
        """As in the base class."""
        return cls(student, teacher, pairs)

    @property
    def required_taps(self) -> list[str]:
        """The whole maps, which the pass over the whole image computes anyway."""
        return self.taps

    @contextlib.contextmanager
    def watch(self) -> Iterator[Mapping[str, Tensor]]:
        """Yields the student's maps by tap."""
        with self.student_taps.recording() as maps:
            yield maps

    @torch.no_grad()
    def __call__(
        self, batched_inputs: BatchedInputs, guidance: Mapping[str, Tensor], dense: Mapping[str, Tensor]
    ) -> TeacherFeatures:
        """The maps are far off where they are not known: whoever looks there is found out."""
        maps, valid = {}, {}
        for tap in self.taps:
            strength = guidance[self.student_of[tap]].abs().mean(1)
            random = self.masks.uniform(tuple(strength.shape), strength.device)
            valid[tap] = (strength > strength.mean()) | (random < 0.25)
            maps[tap] = dense[tap].masked_fill(~valid[tap][:, None], 1e3)
        return TeacherFeatures(maps, valid)

    def state_dict(self) -> dict[str, int]:
        """Returns the position in the sequence of random cells."""
        return self.masks.state()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues the sequence."""
        self.masks.load_state(dict(state))
