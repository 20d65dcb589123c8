"""What the methods share that compare predictions (logits, box deltas) instead of features: nothing is aligned."""

from collections.abc import Sequence

from d2kd.layers import AlignmentError

from .base import Distiller, TapPair


class PredictionDistiller(Distiller):
    """Base of the methods on predictions of equal meaning in both networks.

    These are maps (N, C, H, W), or (R, C) with one row a region or image.
    """

    def check_pairs(self, pairs: Sequence[TapPair]) -> None:
        """Raises AlignmentError unless the two networks predict equally many numbers, at equal strides."""
        for pair in pairs:
            where = f"DISTILL.{self.CONFIG_NODE}.TAPS, {pair.student} <- {pair.teacher}"
            ours, theirs = pair.student_shape, pair.teacher_shape
            if ours.channels != theirs.channels or ours.is_vector != theirs.is_vector:
                raise AlignmentError(
                    f"{where}: the student predicts {ours.channels} numbers, the teacher {theirs.channels}. "
                    f"{type(self).__name__} needs the same classes, anchors and class-agnostic setting."
                )
            if ours.stride != theirs.stride and not self.may_resample(pair):
                raise AlignmentError(
                    f"{where}: the student predicts at stride {ours.stride:g}, "
                    f"the teacher at stride {theirs.stride:g}; they must be equal."
                )

    def may_resample(self, pair: TapPair) -> bool:
        """Whether predictions mean the same at any stride."""
        return False
