"""What trainings took: time of an iteration, the teacher's share of it, and time until the same result."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from d2kd.evaluation.results import ModelResult
from d2kd.visualization import read_training_log


def training_cost(models: Mapping[str, ModelResult], task: str, metric: str) -> dict[str, Any] | None:
    """Returns what the trainings of models took, for report.json; None where none has told what its teacher took.

    Args:
        models: by name; of several seeds, the means.
        task: of the metric, as in metrics.json.
        metric: that counts; larger is better.

    Returns:
        `level`: the metric that all students have come to, the lowest of their last values; None for fewer than two
        students, and where their metrics are of another dataset than their curves. `models`: by name, `iteration_s`,
        `teacher_share` (0 to 1 of the time of the steps) and `to_level_s`: seconds of training until the first
        evaluation with at least that metric. What is not known is None.
    """
    if all(model.teacher_time_s is None for model in models.values()):
        return None
    students = {name: model for name, model in models.items() if name != "teacher"}
    runs = [run for model in students.values() for run in model.runs or (model,)]
    last = [run.metrics.get(metric, math.nan) for run in runs]
    comparable = all(run.dataset == run.curve_dataset for run in runs)
    level = min(last) if len(students) > 1 and comparable and all(map(math.isfinite, last)) else None
    costs = {}
    for name, model in models.items():
        wall, teacher = model.wall_time_s, model.teacher_time_s
        costs[name] = {
            "iteration_s": wall / model.iterations if wall is not None and model.iterations else None,
            "teacher_share": min(teacher / wall, 1.0) if teacher is not None and wall else None,
            "to_level_s": _seconds_to(level, model, task, metric) if name in students else None,
        }
    return {"level": level, "models": costs}


def _seconds_to(level: float | None, model: ModelResult, task: str, metric: str) -> float | None:
    """Seconds of the steps until the first evaluation that came to a level, evaluations aside; the mean of its runs."""
    seconds = []
    for run in model.runs or (model,):
        if level is None or run.metrics_file is None:
            return None
        log = read_training_log(run.metrics_file, f"{run.metrics_scope or task}/{metric}")
        reached = log.metric[log.metric[:, 1] >= level - 1e-9]
        if not len(reached) or not len(log.wall_time):
            return None
        seconds.append(float(np.interp(reached[0, 0], *log.wall_time.T)))
    return statistics.fmean(seconds)
