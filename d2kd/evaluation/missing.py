"""Why a metric is nan: a line for the log, as an early evaluation often has such."""

import math
from collections.abc import Collection, Mapping
from typing import Any

#: The metric of segmentors with a "-" in its own name, as Detectron2 has it.
_HYPHENATED = "min(IoU, B-Iou)"
#: Metrics of COCO over objects of some sizes, by their last letter, and these sizes in pixels.
_SIZES = {"s": "small objects (below 32x32)", "m": "medium objects (32x32 to 96x96)", "l": "large objects (from 96x96)"}
#: Names of classes that a line tells.
_CLASSES = 5


def explain_nan(
    results: Mapping[str, Any], dataset: str, without_predictions: Collection[str] = (), threshold: str = ""
) -> list[str]:
    """Returns a line for each task that has metrics which are nan.

    Args:
        results: metrics by task, of one dataset.
        dataset: its name.
        without_predictions: tasks for which the model has predicted nothing at all.
        threshold: what the score of a prediction must be above, "KEY value"; "" for nothing.
    """
    lines = []
    for task, metrics in results.items():
        missing = [name for name, value in _numbers(metrics) if math.isnan(value)]
        if missing and task in without_predictions:
            above = f" with a score above {threshold}" if threshold else ""
            lines.append(
                f"{task} is nan: the model has found nothing in {dataset}{above}. Early in a training that is usual; "
                "if it stays so, look whether the loss falls, and at SOLVER.BASE_LR and the classes of the data."
            )
        elif missing:
            lines.append(f"{task}: {'; '.join(_reasons(missing, dataset))}.")
    return lines


def class_of_metric(name: str) -> str:
    """Returns the class that a metric is of, "cat" of "AP-cat"; "" for those over all classes."""
    return name.replace(_HYPHENATED, "").partition("-")[2]


def _numbers(metrics: Any) -> list[tuple[str, float]]:
    return [(n, v) for n, v in metrics.items() if isinstance(v, float)] if isinstance(metrics, Mapping) else []


def _reasons(missing: list[str], dataset: str) -> list[str]:
    classes = list(dict.fromkeys(of_class for name in missing if (of_class := class_of_metric(name))))
    overall = [name for name in missing if not class_of_metric(name)]
    reasons = []
    for name in overall:
        size = _SIZES.get(name[-1]) if name[:-1] in ("AP", "AR") else None
        # what has no object at all has none of any size
        if size and not {"AP", "AR"} & set(overall):
            reasons.append(f"{name} is nan, as {dataset} has no {size}")
        elif not size:
            reasons.append(f"{name} is nan, as {dataset} has no ground truth for it")
    if classes:
        more = f" and {len(classes) - _CLASSES} more" if len(classes) > _CLASSES else ""
        reasons.append(f"nan for {', '.join(classes[:_CLASSES])}{more}, of which {dataset} has no ground truth")
    return reasons
