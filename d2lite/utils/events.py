"""Scalars, images and histograms of a training run: their storage, and the writers that publish them."""

import datetime
import json
import logging
import math
import os
import time
from collections import defaultdict
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

import torch
from fvcore.common.history_buffer import HistoryBuffer

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

_STORAGE_STACK: List["EventStorage"] = []


def get_event_storage() -> "EventStorage":
    """Return the storage of the innermost `with EventStorage()`. Raises AssertionError outside of any."""
    assert _STORAGE_STACK, "get_event_storage() works only inside a `with EventStorage(...)` block."
    return _STORAGE_STACK[-1]


def has_event_storage() -> bool:
    """Return whether the code runs inside a `with EventStorage()` block."""
    return bool(_STORAGE_STACK)


class EventStorage:
    """
    Collects what a training run reports, with the iteration at which it was reported.

    Used as a context manager, it is what :func:`get_event_storage` returns inside the block.
    """

    def __init__(self, start_iter: int = 0) -> None:
        """
        Args:
            start_iter: iteration to count from.
        """
        self._history: Dict[str, HistoryBuffer] = defaultdict(HistoryBuffer)
        self._smoothing_hints: Dict[str, bool] = {}
        self._latest_scalars: Dict[str, Tuple[float, int]] = {}
        self._iter = start_iter
        self._current_prefix = ""
        self._vis_data: List[Tuple[str, torch.Tensor, int]] = []
        self._histograms: List[Dict[str, Any]] = []

    def put_scalar(
        self, name: str, value: float, smoothing_hint: bool = True, cur_iter: Optional[int] = None
    ) -> None:
        """
        Add a number.

        Args:
            name: under which it is recorded, after the current :meth:`name_scope`.
            value: a number, or a tensor with one element.
            smoothing_hint: whether writers should show a median over recent values; the same at every call.
            cur_iter: iteration it belongs to; None: the current one.
        """
        name = self._current_prefix + name
        cur_iter = self._iter if cur_iter is None else cur_iter
        value = float(value)
        self._history[name].update(value, cur_iter)
        self._latest_scalars[name] = (value, cur_iter)
        known_hint = self._smoothing_hints.setdefault(name, smoothing_hint)
        assert known_hint == smoothing_hint, f"Scalar '{name}' had smoothing_hint={known_hint} before"

    def put_scalars(
        self, *, smoothing_hint: bool = True, cur_iter: Optional[int] = None, **kwargs: float
    ) -> None:
        """Add several numbers, as by :meth:`put_scalar`: `storage.put_scalars(loss=1.0, accuracy=0.5)`."""
        for name, value in kwargs.items():
            self.put_scalar(name, value, smoothing_hint=smoothing_hint, cur_iter=cur_iter)

    def put_image(self, img_name: str, img_tensor: torch.Tensor) -> None:
        """
        Add an image.

        Args:
            img_name: under which it is shown.
            img_tensor: (3, H, W), RGB, uint8 in [0, 255] or float in [0, 1].
        """
        self._vis_data.append((img_name, img_tensor, self._iter))

    def put_histogram(self, hist_name: str, hist_tensor: torch.Tensor, bins: int = 1000) -> None:
        """
        Add the histogram of a tensor's values.

        Args:
            hist_name: under which it is shown.
            hist_tensor: any shape.
            bins: number of bins between the smallest and the largest value.
        """
        values = hist_tensor.detach().float().cpu()
        low, high = values.min().item(), values.max().item()
        self._histograms.append(
            {
                "tag": hist_name,
                "min": low,
                "max": high,
                "num": values.numel(),
                "sum": values.sum().item(),
                "sum_squares": values.square().sum().item(),
                "bucket_limits": torch.linspace(low, high, bins + 1)[1:].tolist(),
                "bucket_counts": torch.histc(values, bins=bins).tolist(),
                "global_step": self._iter,
            }
        )

    def history(self, name: str) -> HistoryBuffer:
        """Return all values of a scalar. Raises KeyError if it was never put."""
        if name not in self._history:
            raise KeyError(f"No history metric available for '{name}'")
        return self._history[name]

    def histories(self) -> Dict[str, HistoryBuffer]:
        """Return the history of every scalar by name."""
        return self._history

    def latest(self) -> Dict[str, Tuple[float, int]]:
        """Return the last value of every scalar, and its iteration."""
        return self._latest_scalars

    def latest_with_smoothing_hint(self, window_size: int = 20) -> Dict[str, Tuple[float, int]]:
        """
        Return (value, iteration) of every scalar. The value of those to be smoothed is the median of what was
        put in the last `window_size` iterations.
        """
        return {
            name: (self._smoothed(name, window_size) if self._smoothing_hints[name] else value, iteration)
            for name, (value, iteration) in self._latest_scalars.items()
        }

    def _smoothed(self, name: str, window_size: int) -> float:
        return self._history[name].median(self.count_samples(name, window_size))

    def count_samples(self, name: str, window_size: int = 20) -> int:
        """Return how many values of a scalar were put in the `window_size` iterations up to its last one."""
        values = self.history(name).values()
        first = values[-1][1] - window_size
        # Counting from the end: a history can be long, a window is short.
        count = 0
        while count < len(values) and values[-1 - count][1] > first:
            count += 1
        return count

    def smoothing_hints(self) -> Dict[str, bool]:
        """Return for every scalar whether it should be smoothed when shown."""
        return self._smoothing_hints

    def step(self) -> None:
        """Go to the next iteration. What is put belongs to it from now on."""
        self._iter += 1

    @property
    def iter(self) -> int:
        """The current iteration."""
        return self._iter

    @iter.setter
    def iter(self, val: int) -> None:
        self._iter = int(val)

    @property
    def iteration(self) -> int:
        """The current iteration; another name of :attr:`iter`."""
        return self._iter

    @contextmanager
    def name_scope(self, name: str) -> Iterator[None]:
        """Within this block, put the names of scalars behind `<name>/`."""
        outer = self._current_prefix
        self._current_prefix = name.rstrip("/") + "/"
        try:
            yield
        finally:
            self._current_prefix = outer

    def clear_images(self) -> None:
        """Forget the images put so far; called once they are written."""
        self._vis_data = []

    def clear_histograms(self) -> None:
        """Forget the histograms put so far; called once they are written."""
        self._histograms = []

    def __enter__(self) -> "EventStorage":
        _STORAGE_STACK.append(self)
        return self

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        assert _STORAGE_STACK[-1] is self, "EventStorage blocks must be left in the reverse order of entering"
        _STORAGE_STACK.pop()


class EventWriter:
    """Publishes what the current :class:`EventStorage` holds."""

    def write(self) -> None:
        """Publish what is new."""
        raise NotImplementedError

    def close(self) -> None:
        """Release files."""


class _NewScalars:
    """Picks the scalars that are newer than all that were picked before."""

    def __init__(self) -> None:
        self._last = -1

    def take(self, latest: Mapping[str, Tuple[float, int]]) -> Iterator[Tuple[str, float, int]]:
        new = [(name, value, it) for name, (value, it) in latest.items() if it > self._last]
        self._last = max([self._last, *(it for _, _, it in new)])
        yield from new


class JSONWriter(EventWriter):
    """
    Appends scalars to a file, one JSON object per line and iteration; a resumed run continues its file.

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
        self._file_handle = PathManager.open(json_file, "a")
        self._window_size = window_size
        self._new_scalars = _NewScalars()

    def write(self) -> None:
        """Append the scalars put since the last call."""
        by_iteration: Dict[int, Dict[str, Any]] = defaultdict(dict)
        latest = get_event_storage().latest_with_smoothing_hint(self._window_size)
        for name, value, iteration in self._new_scalars.take(latest):
            by_iteration[iteration][name] = _strict_json_number(value)
        for iteration in sorted(by_iteration):
            line = {**by_iteration[iteration], "iteration": iteration}
            self._file_handle.write(json.dumps(line, sort_keys=True) + "\n")
        self._file_handle.flush()

    def close(self) -> None:
        """Close the file."""
        self._file_handle.close()


def _strict_json_number(value: float) -> Any:
    if math.isfinite(value):
        return float(value)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _drop_partial_line(path: str) -> None:
    """Remove the line that a killed process may have left unfinished."""
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
            log_dir: folder of the event files.
            window_size: of the median, for scalars to be smoothed.
            kwargs: of :class:`torch.utils.tensorboard.SummaryWriter`.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._window_size = window_size
        self._writer = SummaryWriter(log_dir, **kwargs)
        self._new_scalars = _NewScalars()

    def write(self) -> None:
        """Write what is new; images and histograms are removed from the storage."""
        storage = get_event_storage()
        latest = storage.latest_with_smoothing_hint(self._window_size)
        for name, value, iteration in self._new_scalars.take(latest):
            self._writer.add_scalar(name, value, iteration)
        for name, image, iteration in storage._vis_data:
            self._writer.add_image(name, image, iteration)
        storage.clear_images()
        for histogram in storage._histograms:
            self._writer.add_histogram_raw(**histogram)
        storage.clear_histograms()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class CommonMetricPrinter(EventWriter):
    """Logs one line with the losses, times, learning rate, memory and the time left."""

    def __init__(self, max_iter: Optional[int] = None, window_size: int = 20) -> None:
        """
        Args:
            max_iter: iteration at which training ends; None: no time left is shown.
            window_size: of the medians shown.
        """
        # Programs that follow a training catch or filter these lines by the name that they have in Detectron2.
        self.logger = logging.getLogger("detectron2.utils.events")
        self._max_iter = max_iter
        self._window_size = window_size
        self._last_write: Optional[Tuple[int, float]] = None

    def write(self) -> None:
        """Log the line; nothing once training is over."""
        storage = get_event_storage()
        iteration = storage.iter
        if iteration == self._max_iter:
            return
        parts = [f"eta: {eta}" if (eta := self._eta(storage)) else "", f"iter: {iteration}"]
        parts += [
            f"{name}: {storage._smoothed(name, self._window_size):.4g}"
            for name in storage.histories()
            if "loss" in name or "[metric]" in name
        ]
        parts += [self._timing(storage, "time"), self._timing(storage, "data_time")]
        if "lr" in storage.histories():
            parts.append(f"lr: {storage.history('lr').latest():.5g}")
        if torch.cuda.is_available():
            parts.append(f"max_mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}M")
        self.logger.info(" " + "  ".join(part for part in parts if part))

    def _timing(self, storage: EventStorage, name: str) -> str:
        if name not in storage.histories():
            return ""
        history = storage.history(name)
        average = history.avg(storage.count_samples(name, self._window_size))
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
