"""The writers that publish what a training run has put into its `EventStorage`."""

import datetime
import json
import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from d2lite.utils.event_storage import EventStorage, get_event_storage, has_event_storage
from d2lite.utils.file_io import PathManager

__all__ = [
    "CommonMetricPrinter",
    "EventStorage",
    "EventWriter",
    "JSONWriter",
    "TensorboardXWriter",
    "get_event_storage",
    "has_event_storage",
]


class EventWriter:
    """Publishes what the current `EventStorage` holds."""

    def write(self) -> None:
        """Publishes what is new."""
        raise NotImplementedError

    def close(self) -> None:
        """Releases files."""


class _NewScalars:
    """Selects the scalars that are newer than all that were returned before."""

    def __init__(self) -> None:
        self._last = -1

    def take(self, latest: Mapping[str, tuple[float, int]]) -> Iterator[tuple[str, float, int]]:
        new = [(name, value, it) for name, (value, it) in latest.items() if it > self._last]
        self._last = max([self._last, *(it for _, _, it in new)])
        yield from new


class JSONWriter(EventWriter):
    """Appends scalars to a file, one JSON object per line and iteration; a resumed run continues its file.

    Numbers that are not finite become the strings "NaN", "Infinity" and "-Infinity", which strict JSON
    readers accept and `float()` understands.
    """

    def __init__(self, json_file: str, window_size: int = 20) -> None:
        """
        Args:
            json_file: path of the file; new lines are appended.
            window_size: of the median, for scalars to be smoothed.
        """
        _drop_partial_line(json_file)
        self._file = PathManager.open(json_file, "a")
        self._window = window_size
        self._new_scalars = _NewScalars()

    def write(self) -> None:
        """Appends the scalars put since the last call."""
        by_iteration: dict[int, dict[str, Any]] = defaultdict(dict)
        latest = get_event_storage().latest_with_smoothing_hint(self._window)
        for name, value, iteration in self._new_scalars.take(latest):
            by_iteration[iteration][name] = _strict_json_number(value)
        for iteration in sorted(by_iteration):
            line = {**by_iteration[iteration], "iteration": iteration}
            self._file.write(json.dumps(line, sort_keys=True) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _strict_json_number(value: float) -> Any:
    if math.isfinite(value):
        return float(value)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _drop_partial_line(path: str) -> None:
    """Removes the line that a killed process may have left unfinished."""
    if not os.path.isfile(path) or os.path.getsize(path) == 0:
        return
    with open(path, "rb+") as f:
        content = f.read()
        if not content.endswith(b"\n"):
            f.truncate(content.rfind(b"\n") + 1)


class TensorboardXWriter(EventWriter):
    """Writes scalars, images and histograms for TensorBoard."""

    def __init__(self, log_dir: str, window_size: int = 20, **kwargs: Any) -> None:
        """
        Args:
            log_dir: directory of the event files.
            window_size: of the median, for scalars to be smoothed.
            kwargs: of `torch.utils.tensorboard.SummaryWriter`.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._window = window_size
        self._writer = SummaryWriter(log_dir, **kwargs)
        self._new_scalars = _NewScalars()

    def write(self) -> None:
        """Writes what is new; images and histograms are removed from the storage."""
        events = get_event_storage()
        for scalar in self._new_scalars.take(events.latest_with_smoothing_hint(self._window)):
            self._writer.add_scalar(*scalar)
        for image in events._vis_data:
            self._writer.add_image(*image)
        events.clear_images()
        for histogram in events._histograms:
            self._writer.add_histogram_raw(**histogram)
        events.clear_histograms()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class CommonMetricPrinter(EventWriter):
    """Logs one line with the losses, times, learning rate, memory and the time left."""

    def __init__(self, max_iter: int | None = None, window_size: int = 20) -> None:
        """
        Args:
            max_iter: iteration at which training ends; None: no time left is shown.
            window_size: of the medians shown.
        """
        # Programs that monitor a training catch or filter these lines by the name that they have in Detectron2.
        self.logger = logging.getLogger("detectron2.utils.events")
        self._max_iter = max_iter
        self._window = window_size
        self._last_write: tuple[int, float] | None = None

    def write(self) -> None:
        """Logs the line; nothing once training is over."""
        events = get_event_storage()
        if events.iter != self._max_iter:
            self.logger.info(" %s", "  ".join(part for part in self._parts(events) if part))

    def _parts(self, storage: EventStorage) -> Iterator[str]:
        eta = self._eta(storage)
        yield eta and f"eta: {eta}"
        yield f"iter: {storage.iter}"
        for name in storage.histories():
            if "loss" in name or "[metric]" in name:
                yield f"{name}: {storage._smoothed(name, self._window):.4g}"
        yield self._timing(storage, "time")
        yield self._timing(storage, "data_time")
        if "lr" in storage.histories():
            yield f"lr: {storage.history('lr').latest():.5g}"
        if torch.cuda.is_available():
            yield f"max_mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}M"

    def _timing(self, storage: EventStorage, name: str) -> str:
        if name not in storage.histories():
            return ""
        history = storage.history(name)
        average = history.avg(storage.count_samples(name, self._window))
        return f"{name}: {average:.4f}  last_{name}: {history.latest():.4f}"

    def _eta(self, storage: EventStorage) -> str:
        if self._max_iter is None:
            return ""
        if "time" in storage.histories():
            seconds = storage.history("time").median(1000)
            remaining = seconds * (self._max_iter - storage.iter - 1)
            storage.put_scalar("eta_seconds", remaining, smoothing_hint=False)
        else:
            now = (storage.iter, time.perf_counter())
            last, self._last_write = self._last_write, now
            if last is None or last[0] >= now[0]:
                return ""
            seconds = (now[1] - last[1]) / (now[0] - last[0])
        return str(datetime.timedelta(seconds=int(seconds * (self._max_iter - storage.iter - 1))))
