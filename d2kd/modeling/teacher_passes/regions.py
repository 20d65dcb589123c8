"""The pass of a box head over the regions that the student sampled."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2kd.distillers import TapPair
from detectron2.config import CfgNode

from ..architectures import GeneralizedRCNN, architecture_of
from ..taps import FeatureTaps, TapError
from ..teacher import BatchedInputs, Teacher
from .base import TEACHER_PASSES, TeacherFeatures, TeacherPass

#: Boxes of each image (Detectron2's `Boxes`), one list a call of the student's box pooler.
Regions = list[Sequence[Any]]


@TEACHER_PASSES.register()
class RegionPass(TeacherPass):
    """Runs the teacher's pooler and box head, without backbone and proposals, on the regions of the student's box head.

    In a cascade, each stage has its own regions. Rows of student and teacher mean the same regions, in the same order.
    """

    needs_student = True

    def __init__(self, student: nn.Module, teacher: Teacher, taps: Sequence[tuple[int, str]]) -> None:
        """
        Args:
            student: an R-CNN.
            teacher: of an R-CNN.
            taps: in the teacher's box head, each with the stage of the student whose regions it gets.

        Raises:
            TapError: the teacher has no such tap, or one is asked for on the regions of two stages.
        """
        super().__init__(teacher, [tap for _, tap in taps])
        ours, theirs = _rcnn(student), _rcnn(teacher.model)
        self._required_taps = theirs.pooled_features
        self._student_pooler, self._pooler = ours.pooler, theirs.pooler
        runs: dict[tuple[int, int], list[str]] = {}
        for student_stage, tap in taps:
            runs.setdefault((student_stage, _stage_of(theirs, tap)), []).append(tap)
        self._runs = [(s, theirs.stages[t], FeatureTaps(teacher.model, names)) for (s, t), names in runs.items()]
        duplicates = sorted({tap for _, tap in taps if [t for _, t in taps].count(tap) > 1})
        if duplicates:
            raise TapError(
                f"The teacher's taps {', '.join(duplicates)} are compared with several stages of the student's "
                "cascade: pair each with one stage."
            )

    @classmethod
    def from_config(cls, cfg: CfgNode, student: nn.Module, teacher: Teacher, pairs: Iterable[TapPair]) -> "RegionPass":
        """As in the base class.

        Raises:
            TapError: a tap of student or teacher gives no rows of regions.
        """
        architecture = _rcnn(student)
        taps = {(_stage_of(architecture, pair.student.name), pair.teacher.name): None for pair in pairs}
        return cls(student, teacher, list(taps))

    @property
    def required_taps(self) -> list[str]:
        """The maps that the pooler reads."""
        return self._required_taps

    @contextlib.contextmanager
    def watch(self) -> Iterator[Regions]:
        """Yields a list that the student's forward pass fills: the regions of each stage, N `Boxes` each."""
        regions: Regions = []
        # the pooler is called with (features, boxes), so its rows and those of all that follows are exactly these boxes
        handle = self._student_pooler.register_forward_pre_hook(lambda module, args: regions.append(args[1]))
        try:
            yield regions
        finally:
            handle.remove()

    @torch.no_grad()
    def __call__(
        self, batched_inputs: BatchedInputs, guidance: Regions, dense: Mapping[str, Tensor]
    ) -> TeacherFeatures:
        """As in the base class; the regions are in pixels of the padded image, the same frame for both models."""
        maps = [dense[name] for name in self._required_taps]
        outputs: dict[str, Tensor] = {}
        with self.teacher.autocast():
            for student_stage, stage, taps in self._runs:
                with taps.recording() as recorded:
                    stage.predictor(stage.head(self._pooler(maps, guidance[student_stage])))
                outputs.update(recorded)
        return TeacherFeatures(outputs, {})


def _rcnn(model: nn.Module) -> GeneralizedRCNN:
    architecture = architecture_of(model)
    if not isinstance(architecture, GeneralizedRCNN) or not architecture.stages:
        raise TapError(f"A {type(model).__name__} has no box head, so there are no regions to compare its features on.")
    return architecture


def _stage_of(architecture: GeneralizedRCNN, tap: str) -> int:
    stage = architecture.stage_of(tap)
    if stage is None:
        raise TapError(
            f"Tap {tap!r} lies in no stage of the {type(architecture.model).__name__}'s box head, and a tap that does "
            "can be compared with another such tap only: their rows are the regions that the student sampled."
        )
    return stage
