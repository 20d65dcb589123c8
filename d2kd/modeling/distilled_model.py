"""DistilledModel: a student that learns from its task and a teacher's features; at inference, the student alone."""

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from d2kd.distillers import Distiller

from .balance import GradientBalance
from .roi_outputs import SampledRegions
from .taps import FeatureTaps, TapError, is_in_backbone
from .teacher import Teacher


class DistilledModel(nn.Module):
    """A student, a teacher and the methods between them.

    In training it returns the student's losses plus "distill/<method>/<tap>" for every method and level; otherwise what
    the student returns. Only student and distillers are submodules: `student.state_dict()` has plain Detectron2 keys,
    and the teacher is in no `state_dict`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        distillers: Mapping[str, Distiller],
        balance: GradientBalance | None = None,
    ) -> None:
        """
        Args:
            student: any Detectron2 model.
            teacher: gives every teacher tap that the distillers name.
            distillers: by the name that their losses carry.
            balance: measures, logs or scales the methods' gradients; None does neither.
        """
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.distillers = nn.ModuleDict(distillers)
        self.balance = balance
        taps = [pair.student for d in distillers.values() for pair in d.pairs]
        self._shared_taps = _shared_taps(student, taps) if balance is not None else []
        self._taps = FeatureTaps(student, [*taps, *self._shared_taps])
        self._regions = SampledRegions(student) if teacher.needs_regions else None

    @property
    def device(self) -> torch.device:
        """Where the student lives."""
        return next(self.student.parameters()).device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """
        Args:
            batched_inputs: Detectron2's input format; in training with ground truth.

        Returns:
            In training a dict of scalar losses, else the student's output.

        Raises:
            TapError: a tap did not fire, or a method gave no loss.
        """
        if not self.training or not self.distillers:
            return self.student(batched_inputs)
        # one copy to the device serves both networks
        batched_inputs = [{**x, "image": x["image"].to(self.device, non_blocking=True)} for x in batched_inputs]
        # the teacher comes first: what it needs in passing is free again before the student's graph grows
        teacher_features = self.teacher.features(batched_inputs)
        with self._taps.recording() as student_features, self._recording_regions() as regions:
            losses = dict(self.student(batched_inputs))
        if self._regions is not None:
            teacher_features.update(self.teacher.region_features(teacher_features, regions))
        distilled = {
            method: _named_losses(method, distiller(student_features, teacher_features))
            for method, distiller in self.distillers.items()
        }
        if self.balance is not None:
            distilled = self.balance(losses, distilled, [student_features[name] for name in self._shared_taps])
        for named in distilled.values():
            losses.update(named)
        return losses

    @torch.no_grad()
    def observe(
        self, distiller: Distiller, batched_inputs: list[dict[str, Any]]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What a method would compare, both networks in evaluation mode, each run once and as far as its deepest tap.

        Returns:
            Maps of the student and of the teacher by tap name.
        """
        batched_inputs = [{**x, "image": x["image"].to(self.device, non_blocking=True)} for x in batched_inputs]
        was_training = self.student.training
        self.student.eval()
        taps = FeatureTaps(self.student, [pair.student for pair in distiller.pairs])
        try:
            with taps.recording(stop_when_done=True) as student_features:
                self.student(batched_inputs)
        finally:
            self.student.train(was_training)
        return student_features, self.teacher.features(batched_inputs)

    def _recording_regions(self) -> AbstractContextManager:
        return contextlib.nullcontext() if self._regions is None else self._regions.recording()


def _shared_taps(student: nn.Module, taps: Sequence[str]) -> list[str]:
    """What the gradients of task and methods share: the taps in the backbone, or all that it gives to the heads."""
    in_backbone = [name for name in taps if is_in_backbone(student, name)]
    return list(dict.fromkeys(in_backbone)) or list(student.backbone.output_shape())


def _named_losses(method: str, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not losses:
        raise TapError(f"Method {method} gave no loss: check DISTILL.METHODS and its taps.")
    return {f"distill/{method}/{tap}": loss for tap, loss in losses.items()}
