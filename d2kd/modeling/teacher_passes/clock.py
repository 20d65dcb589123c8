"""How long the teacher takes in a training, without making the host wait for a GPU."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import torch


class TeacherClock:
    """Adds up the seconds of blocks of code; on a GPU those of the device, known a little later."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def __call__(self, device: torch.device) -> Iterator[None]:
        """Counts the block, whose work is done on that device."""
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._add_finished()  # whoever never takes the seconds keeps no more events than are under way
            self._running.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def take(self) -> float:
        """Returns the seconds since the last call, without the blocks that a GPU has not finished yet."""
        self._add_finished()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _add_finished(self) -> None:
        while self._running and self._running[0][1].query():
            start, end = self._running.popleft()
            self._seconds += start.elapsed_time(end) / 1000
