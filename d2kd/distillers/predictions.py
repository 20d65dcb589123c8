"""Base class of methods that compare predictions (logits, box deltas) instead of features: nothing is aligned."""

from collections.abc import Sequence

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
        kinds = self.predictions()
        for tap in pair:
            if tap.prediction is not None and kinds and tap.prediction.kind not in kinds:
                raise AlignmentError(
                    f"{key}, {pair}: {tap.name} predicts {tap.prediction.kind}; {type(self).__name__} compares "
                    f"{' and '.join(kinds)}."
                )
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


def scores_of_places(key: str, pairs: Sequence[TapPair]) -> list[int]:
    """Returns for each pair the number of that with the classes of the same place, itself for classes.

    Args:
        key: of the configuration, for the error.
        pairs: whose teacher's taps are predictions.

    Raises:
        AlignmentError: nothing is known of one, or there are boxes of a place and not its classes.
    """
    known = [pair.teacher.prediction for pair in pairs]
    where = {(p.location, p.place): i for i, p in enumerate(known) if p is not None and p.kind == "class_logits"}
    found = []
    for pair, prediction in zip(pairs, known):
        if prediction is None:
            raise AlignmentError(f"{key}, {pair}: it is unknown what is predicted there.")
        if (prediction.location, prediction.place) not in where:
            place = f"{prediction.location} {prediction.place or ''}".strip()
            raise AlignmentError(f"{key}, {pair}: the class logits of the same place ({place}) must be named too.")
        found.append(where[prediction.location, prediction.place])
    return found


def check_same_meaning(where: str, student: Prediction, teacher: Prediction) -> None:
    """Raises AlignmentError if two predictions have different anchors, box encodings or classifiers."""
    ours, theirs = (f"{p.location} {p.activation} {p.kind}".replace("  ", " ") for p in (student, teacher))
    if ours != theirs:
        raise AlignmentError(f"{where}: the student's are {ours}, the teacher's {theirs}.")
    for what in {**student.requires, **teacher.requires}:
        have = student.requires.get(what), teacher.requires.get(what)
        if have[0] != have[1]:
            ours, theirs = ("nothing that is known" if value is None else value for value in have)
            raise AlignmentError(
                f"{where}: student and teacher must have the same {what}, but have {ours} and {theirs}."
            )
