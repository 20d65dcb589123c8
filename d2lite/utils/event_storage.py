"""Storage in which a training run collects its scalars, images and histograms."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fvcore.common.history_buffer import HistoryBuffer

_STORAGE_STACK: list["EventStorage"] = []


def get_event_storage() -> "EventStorage":
    """Returns the storage of the innermost `with EventStorage()`. Raises AssertionError outside of any."""
    assert _STORAGE_STACK, "get_event_storage() works only inside a `with EventStorage(...)` block."
    return _STORAGE_STACK[-1]


def has_event_storage() -> bool:
    """Returns whether the code runs inside a `with EventStorage()` block."""
    return bool(_STORAGE_STACK)


class EventStorage:
    """Collects what a training run reports, with the iteration at which it was reported.

    Used as a context manager, it is what `get_event_storage` returns inside the block.
    """

    def __init__(self, start_iter: int = 0) -> None:
        """
        Args:
            start_iter: iteration to count from.
        """
        self._history: dict[str, HistoryBuffer] = defaultdict(HistoryBuffer)
        self._smoothing_hints: dict[str, bool] = {}
        self._latest_scalars: dict[str, tuple[float, int]] = {}
        self._iter = start_iter
        self._current_prefix = ""
        self._vis_data: list[tuple[str, torch.Tensor, int]] = []
        self._histograms: list[dict[str, Any]] = []

    def put_scalar(self, name: str, value: float, smoothing_hint: bool = True, cur_iter: int | None = None) -> None:
        """Adds a number.

        Args:
            name: under which it is recorded, after the current `name_scope`.
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

    def put_scalars(self, *, smoothing_hint: bool = True, cur_iter: int | None = None, **kwargs: float) -> None:
        """Adds several numbers, as by `put_scalar`: `storage.put_scalars(loss=1.0, accuracy=0.5)`."""
        for name, value in kwargs.items():
            self.put_scalar(name, value, smoothing_hint=smoothing_hint, cur_iter=cur_iter)

    def put_image(self, img_name: str, img_tensor: torch.Tensor) -> None:
        """Adds an image.

        Args:
            img_name: under which it is shown.
            img_tensor: (3, H, W), RGB, uint8 in [0, 255] or float in [0, 1].
        """
        self._vis_data.append((img_name, img_tensor, self._iter))

    def put_histogram(self, hist_name: str, hist_tensor: torch.Tensor, bins: int = 1000) -> None:
        """Adds the histogram of a tensor's values.

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
        """Returns all values of a scalar. Raises KeyError if it was never put."""
        if name not in self._history:
            raise KeyError(f"No history metric available for '{name}'")
        return self._history[name]

    def histories(self) -> dict[str, HistoryBuffer]:
        """Returns the history of every scalar by name."""
        return self._history

    def latest(self) -> dict[str, tuple[float, int]]:
        """Returns the last value of every scalar, and its iteration."""
        return self._latest_scalars

    def latest_with_smoothing_hint(self, window_size: int = 20) -> dict[str, tuple[float, int]]:
        """Returns (value, iteration) of every scalar. The value of those to be smoothed is the median of what was
        put in the last `window_size` iterations.
        """
        return {
            name: (self._smoothed(name, window_size) if self._smoothing_hints[name] else value, iteration)
            for name, (value, iteration) in self._latest_scalars.items()
        }

    def _smoothed(self, name: str, window_size: int) -> float:
        return self._history[name].median(self.count_samples(name, window_size))

    def count_samples(self, name: str, window_size: int = 20) -> int:
        """Returns how many values of a scalar were put in the `window_size` iterations up to its last one."""
        values = self.history(name).values()
        first = values[-1][1] - window_size
        # Counting from the end: a history can be long, a window is short.
        count = 0
        while count < len(values) and values[-1 - count][1] > first:
            count += 1
        return count

    def smoothing_hints(self) -> dict[str, bool]:
        """Returns for every scalar whether it should be smoothed when shown."""
        return self._smoothing_hints

    def step(self) -> None:
        """Advances to the next iteration. What is put belongs to it from now on."""
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
        """The current iteration; another name of `iter`."""
        return self._iter

    @contextmanager
    def name_scope(self, name: str) -> Iterator[None]:
        """Prefixes the scalars that are put within this block by `<name>/`."""
        outer = self._current_prefix
        self._current_prefix = name.rstrip("/") + "/"
        try:
            yield
        finally:
            self._current_prefix = outer

    def clear_images(self) -> None:
        """Removes the images put so far; called once they are written."""
        self._vis_data = []

    def clear_histograms(self) -> None:
        """Removes the histograms put so far; called once they are written."""
        self._histograms = []

    def __enter__(self) -> "EventStorage":
        _STORAGE_STACK.append(self)
        return self

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        assert _STORAGE_STACK[-1] is self, "EventStorage blocks must be left in the reverse order of entering"
        _STORAGE_STACK.pop()
