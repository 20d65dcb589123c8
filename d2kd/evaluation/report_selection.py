"""Which images report.html shows: those on which the compared models differ most."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from d2kd.evaluation.report_inputs import ReportInputs, evenly_spread
from d2kd.visualization.matching import judge, objects_of

#: So many label maps of a single model.
SPREAD = 24
#: Image of the dataset, and how large the difference of the compared models is on it.
Ranked = tuple[dict[str, Any], float]


def rank(inputs: ReportInputs, threshold: float) -> tuple[list[Ranked], str]:
    """Sorts the images of a dataset, those first on which the two models of `inputs.pair` differ most.

    Of detectors, the objects that only one of both finds are counted, and where they are as many, wrong detections; of
    segmentors the pixels; of classifiers the scores of the true class are compared. With one model, what it gets wrong
    comes first, and label maps are spread evenly.

    Args:
        inputs: images and predictions.
        threshold: the score from which on detections count.

    Returns:
        The images with their difference, and words for the order, with {} for the names of the two models.
    """
    return {"detections": _detections, "label_maps": _label_maps, "classes": _classes}[inputs.kind](inputs, threshold)


def has_truth(inputs: ReportInputs) -> bool:
    """Whether any image has annotations."""
    key = {"detections": "annotations", "label_maps": "sem_seg_file_name", "classes": "label"}[inputs.kind]
    return any(record.get(key) not in (None, []) for record in inputs.records)


def _detections(inputs: ReportInputs, threshold: float) -> tuple[list[Ranked], str]:
    pair = inputs.pair
    compared = pair or tuple(inputs.predictions)
    known = has_truth(inputs)
    ranked = []
    for record in inputs.records:
        size = (record["height"], record["width"]) if inputs.by_masks and "height" in record else None
        said = [inputs.predictions[name].get(record["image_id"], []) for name in compared]
        finds = [judge(predictions, record, threshold, size)[1] for predictions in said]
        found = [set(f[f >= 0].tolist()) for f in finds]
        wrong = [int((f < 0).sum()) for f in finds]
        if pair is None:
            difference = float(len(objects_of(record).boxes) - len(found[0]) + wrong[0]) if known else float(wrong[0])
        else:
            apart = abs(wrong[0] - wrong[1])
            difference = len(found[0] ^ found[1]) + apart / (1 + apart)
        ranked.append((record, difference))
    how = f"at a score of at least {threshold:g}"
    if pair is None:
        how = (
            "those with most objects missed and wrong detections, " if known else "those with most detections "
        ) + how
    elif known:
        how = "those where {} and {} differ most in the objects found, then in the number of wrong detections, " + how
    else:
        how = "those where {} and {} differ most in the number of detections, " + how
    return _largest_first(ranked), how


def _label_maps(inputs: ReportInputs, _: float) -> tuple[list[Ranked], str]:
    if inputs.pair is None:
        chosen = evenly_spread(inputs.records, SPREAD)
        return [(record, 0.0) for record in chosen], "evenly spread over the dataset"
    one, other = (inputs.predictions[name] for name in inputs.pair)
    ranked = [(record, one.difference(other, record["file_name"])) for record in inputs.records]
    return _largest_first(ranked), "those where {} and {} give most pixels different classes"


def _classes(inputs: ReportInputs, _: float) -> tuple[list[Ranked], str]:
    pair = inputs.pair
    compared = [inputs.predictions[name] for name in (pair or inputs.predictions)]
    ranked = []
    for record in inputs.records:
        said = [answers[record["image_id"]] for answers in compared if record["image_id"] in answers]
        if len(said) < len(compared):
            continue
        scores = [float(np.nan_to_num(s.true_score or 0.0)) for s in said]
        # what is said comes before how surely
        differs = len({s.classes[0] for s in said if s.classes}) > 1
        ranked.append((record, differs + abs(scores[0] - scores[1]) if pair else 1 - scores[0]))
    if pair is None:
        return _largest_first(ranked), "those whose true class has the lowest score"
    return _largest_first(ranked), (
        "first those where {} and {} say different classes, then by the difference of their scores of the true class"
    )


def _largest_first(ranked: Sequence[Ranked]) -> list[Ranked]:
    return sorted(ranked, key=lambda entry: -entry[1])
