"""Training curves of several runs, read from the metrics.json that each training writes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from matplotlib.figure import Figure

COLORS = ("#444444", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00")  # distinct to color-blind readers too


@dataclass(frozen=True)
class TrainingLog:
    """Curves over iterations, each of shape (N, 2) with the iteration in column 0; `wall_time` in seconds of steps."""

    loss: np.ndarray
    metric: np.ndarray
    wall_time: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))


def read_training_log(path: str, metric: str = "bbox/AP") -> TrainingLog:
    """Reads a metrics.json: one JSON object per line with `iteration` and scalars.

    The loss is the sum of the task's own losses (`loss_*`), which runs with and without distillation have in
    common, or `total_loss` where there are none. Of an iteration that a resumed run repeats, the last line counts;
    a last line cut short by an interruption is skipped.
    """
    records: dict[int, dict[str, float]] = {}
    with open(path) as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and "iteration" in record:
                records.setdefault(record["iteration"], {}).update(record)
    losses, metrics, times = [], [], []
    for iteration, record in sorted(records.items()):
        task_losses = [value for name, value in record.items() if name.startswith("loss")]
        if task_losses or "total_loss" in record:
            losses.append((iteration, sum(task_losses) if task_losses else record["total_loss"]))
        if metric in record:
            metrics.append((iteration, record[metric]))
        if "wall_time" in record:
            times.append((iteration, record["wall_time"]))
    return TrainingLog(*(np.array(points, dtype=float).reshape(-1, 2) for points in (losses, metrics, times)))


def training_curves(logs: Mapping[str, TrainingLog], metric: str = "AP") -> Figure:
    """Draws the loss and the validation metric of each run over its iterations.

    Args:
        logs: by the name to show in the legend.
        metric: what the right axis is called.
    """
    figure = Figure(figsize=(10, 3.6), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, log) in enumerate(logs.items()):
        color = COLORS[number % len(COLORS)]
        left.plot(*smooth(log.loss).T, color=color, label=name, linewidth=1.5)
        right.plot(*log.metric.T, color=color, label=name, linewidth=1.5, marker="o", markersize=4)
    left.set(xlabel="iteration", ylabel="task loss, without distillation terms")
    right.set(xlabel="iteration", ylabel=metric)
    if any((log.loss[:, 1] > 0).any() for log in logs.values()):
        left.set_yscale("log")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.set_xlim(left=0)
        axis.spines[["top", "right"]].set_visible(False)
    if logs:
        left.legend(frameon=False)
    return figure


def smooth(curve: np.ndarray, points: int = 50) -> np.ndarray:
    """Averages a curve (N, 2) over windows, so that at most `points` remain."""
    if len(curve) <= points:
        return curve
    return np.array([window.mean(axis=0) for window in np.array_split(curve, points)])
