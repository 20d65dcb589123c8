"""Base class of methods that compare predictions (logits, box deltas) instead of features: nothing is aligned."""

from torch import Tensor

from .base import Distiller
from .taps import AlignmentError, Prediction, TapPair


class PredictionDistiller(Distiller):
    """Base of the methods on predictions of equal meaning in both networks.

    These are maps (N, C, H, W), or (R, C) with one row per region or image.
    """

    def check_pair(self, key: str, pair: TapPair) -> None:
        """Raises AlignmentError unless the two networks predict the same numbers, at equal strides."""
        ours, theirs = pair
        if ours.prediction is not None and theirs.prediction is not None:
            check_same_meaning(f"{key}, {pair}", ours.prediction, theirs.prediction)
        if ours.channels != theirs.channels or ours.is_vector != theirs.is_vector:
            raise AlignmentError(
                f"{key}, {pair}: the student predicts {ours.channels} numbers, the teacher {theirs.channels}. "
                f"{type(self).__name__} needs the same classes, anchors and class-agnostic setting."
            )
        if ours.stride != theirs.stride and not self.may_resample(pair):
            raise AlignmentError(
                f"{key}, {pair}: the student predicts at stride {ours.stride:g}, the teacher at stride "
                f"{theirs.stride:g}; they must be equal."
            )

    def in_teacher_channels(self, level: int, student: Tensor) -> Tensor | None:
        """Returns the map as it is: predictions of both networks mean the same."""
        return student

    def may_resample(self, pair: TapPair) -> bool:
        """Returns whether predictions mean the same at any stride."""
        return False


def check_same_meaning(where: str, student: Prediction, teacher: Prediction) -> None:
    """Raises AlignmentError if two predictions have different anchors, box encodings or classifiers."""
    ours, theirs = (f"{p.location} {p.activation} {p.kind}".replace("  ", " ") for p in (student, teacher))
    if ours != theirs:
        raise AlignmentError(f"{where}: the student's are {ours}, the teacher's {theirs}.")
    for what, value in student.requires.items():
        if value != teacher.requires.get(what):
            raise AlignmentError(
                f"{where}: student and teacher must have the same {what}, but have {value} and "
                f"{teacher.requires.get(what)}."
            )
