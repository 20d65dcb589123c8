"""What trainings took: time of an iteration, the teacher's share of it, and time until the same result."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from d2kd.evaluation.results import ModelResult
from d2kd.visualization import TrainingLog


def training_cost(
    models: Mapping[str, ModelResult], logs: Mapping[str, TrainingLog], metric: str
) -> dict[str, Any] | None:
    """Returns what the trainings of models took, for report.json; None where none has told what its teacher took.

    Args:
        models: by name.
        logs: of those that have one, by name.
        metric: that counts; larger is better.

    Returns:
        `level`: the metric that all students have come to, the lowest of their last values; None for fewer than two
        students. `models`: by name, `iteration_s`, `teacher_share` (0 to 1 of the time of the steps) and
        `to_level_s`: seconds of training until the first evaluation with at least that metric. What is not known is
        None.
    """
    if all(model.teacher_time_s is None for model in models.values()):
        return None
    students = {name: model for name, model in models.items() if name != "teacher"}
    last = [model.metrics.get(metric, math.nan) for model in students.values()]
    level = min(last) if len(last) > 1 and all(map(math.isfinite, last)) else None
    costs = {}
    for name, model in models.items():
        wall, teacher = model.wall_time_s, model.teacher_time_s
        costs[name] = {
            "iteration_s": wall / model.iterations if wall is not None and model.iterations else None,
            "teacher_share": min(teacher / wall, 1.0) if teacher is not None and wall else None,
            "to_level_s": _seconds_to(level, logs.get(name)) if name in students else None,
        }
    return {"level": level, "models": costs}


def _seconds_to(level: float | None, log: TrainingLog | None) -> float | None:
    """Seconds of the steps until the first evaluation that came to a level; evaluations take none."""
    if level is None or log is None or not len(log.metric) or not len(log.wall_time):
        return None
    reached = log.metric[log.metric[:, 1] >= level - 1e-9]
    return float(np.interp(reached[0, 0], *log.wall_time.T)) if len(reached) else None
