"""What the methods share that compare predictions (logits, box deltas) instead of features: there is nothing to align."""

from typing import Sequence

from d2kd.layers import AlignmentError

from .base import Distiller, TapPair


class PredictionDistiller(Distiller):
    """Base of the methods on predictions: maps (N, C, H, W) or one row a region or image, (R, C), of equal meaning in both networks."""

    def check_pairs(self, pairs: Sequence[TapPair]) -> None:
        """Raises AlignmentError unless the two networks predict equally many numbers, at equal strides."""
        for pair in pairs:
            ours, theirs = pair.student_shape, pair.teacher_shape
            if ours.channels != theirs.channels or ours.is_vector != theirs.is_vector:
                raise AlignmentError(
                    f"DISTILL.{self.CONFIG_NODE}.TAPS, {pair.student} <- {pair.teacher}: the student predicts {ours.channels} numbers, "
                    f"the teacher {theirs.channels}. {type(self).__name__} needs the same classes, anchors and class-agnostic setting."
                )
            if ours.stride != theirs.stride and not self.may_resample(pair):
                raise AlignmentError(
                    f"DISTILL.{self.CONFIG_NODE}.TAPS, {pair.student} <- {pair.teacher}: the student predicts at stride {ours.stride:g}, "
                    f"the teacher at stride {theirs.stride:g}; they must be equal."
                )

    def may_resample(self, pair: TapPair) -> bool:
        """Whether predictions mean the same at any stride."""
        return False
