"""How the teacher computes features: passes, which may be conditioned on the student."""

import contextlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from d2kd.distillers import TapPair
from detectron2.config import CfgNode
from detectron2.utils.registry import Registry

from ..teacher import BatchedInputs, Teacher

TEACHER_PASSES = Registry("TEACHER_PASSES")
TEACHER_PASSES.__doc__ = (
    "Ways to compute the teacher's features, by the name that `DISTILL.<METHOD>.TEACHER_PASS` uses."
)


class TeacherFeatures(NamedTuple):
    """Features of the teacher, and where they were computed."""

    #: (N, C, H, W), or (R, C) with a row per region or image, by tap.
    maps: dict[str, Tensor]
    #: (N, H, W) bool by tap: True where the map was computed. Taps without an entry are whole.
    valid: dict[str, Tensor]


class TeacherPass:
    """One way to compute features of the teacher; an object, because the student may decide what is computed.

    A pass that does not need the student runs before it, so that its activations are freed before the student's graph
    is built. Another one watches the student's forward pass (`watch`), and runs after it with what it has seen there
    (its guidance): the regions that the student sampled, the tokens that it attends to.

    Attributes:
        needs_student: whether it runs after the student.
    """

    needs_student: ClassVar[bool] = False

    def __init__(self, teacher: Teacher, taps: Iterable[str]) -> None:
        """
        Args:
            teacher: whose features these are.
            taps: what the pass gives.
        """
        self.teacher = teacher
        self.taps = list(dict.fromkeys(taps))

    @classmethod
    def from_config(cls, cfg: CfgNode, student: nn.Module, teacher: Teacher, pairs: Iterable[TapPair]) -> "TeacherPass":
        """Returns the pass that gives the teacher's taps of some pairs.

        Raises:
            UserError: it cannot, with the key to change.
        """
        return cls(teacher, [pair.teacher.name for pair in pairs])

    @property
    def required_taps(self) -> list[str]:
        """Taps of the teacher, over the whole image, that the pass starts from; computed once for all passes."""
        return []

    @property
    def sparse(self) -> bool:
        """Whether the pass may compute parts of a map only (and then says where, see `TeacherFeatures.valid`)."""
        return False

    def watch(self) -> AbstractContextManager[Any]:
        """Returns a context for the student's forward pass; what it yields is the guidance of that step."""
        return contextlib.nullcontext()

    def __call__(self, batched_inputs: BatchedInputs, guidance: Any, dense: Mapping[str, Tensor]) -> TeacherFeatures:
        """
        Args:
            batched_inputs: in Detectron2's format, on the device.
            guidance: what `watch` has yielded.
            dense: the maps of the pass over the whole image, among them those of `required_taps`.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Returns what the pass has drawn so far (the position of a random sequence); saved, and undone with a step."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` has returned."""
