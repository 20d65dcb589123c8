"""Hooks that profile the training and watch GPU memory."""

import logging
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, tensorboard_trace_handler

from d2lite.engine.trainer_base import HookBase, TrainerBase
from d2lite.utils.file_io import PathManager

logger = logging.getLogger(__name__)

Predicate = Callable[[TrainerBase], bool]


class _Profiler(HookBase):
    """Runs a profiler, which subclasses make, over chosen iterations, and lets them write what it found."""

    def __init__(self, wanted: Predicate) -> None:
        self._wanted = wanted
        self._running = ExitStack()
        self._profiler: Any = None

    def before_step(self) -> None:
        if self._wanted(self.trainer):
            self._profiler = self._running.enter_context(self._make())

    def after_step(self) -> None:
        if self._profiler is not None:
            self._running.close()
            self._write(self._profiler)
            self._profiler = None

    def _make(self) -> AbstractContextManager[Any]:
        raise NotImplementedError

    def _write(self, profiler: Any) -> None:
        raise NotImplementedError


class TorchProfiler(_Profiler):
    """Profiles chosen iterations with `torch.profiler`: traces, and tables of the slowest operators."""

    def __init__(
        self,
        enable_predicate: Predicate,
        output_dir: str,
        *,
        activities: Iterable[ProfilerActivity] | None = None,
        save_tensorboard: bool = True,
    ) -> None:
        """
        Args:
            enable_predicate: called with the trainer before each iteration; True profiles it.
            output_dir: traces and tables go to `<output_dir>/log`.
            activities: what to watch; None is the CPU, and the GPU where there is one.
            save_tensorboard: whether to write traces.
        """
        super().__init__(enable_predicate)
        here = [ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + torch.cuda.is_available()]
        self._watched = here if activities is None else list(activities)
        self._folder = os.path.join(output_dir, "log")
        self._traces = save_tensorboard

    def _make(self) -> profile:
        worker = f"profiler-tensorboard-iter{self.trainer.iter}"
        handler = tensorboard_trace_handler(self._folder, worker) if self._traces else None
        details = dict.fromkeys(("record_shapes", "profile_memory", "with_stack", "with_flops"), True)
        return profile(activities=self._watched, on_trace_ready=handler, **details)

    def _write(self, profiler: profile) -> None:
        averages = profiler.key_averages()
        PathManager.mkdirs(self._folder)
        for key in ("cpu_time_total", "device_time_total")[: 1 + (ProfilerActivity.CUDA in self._watched)]:
            path = os.path.join(self._folder, f"profiler-{key}-iter{self.trainer.iter}.txt")
            with PathManager.open(path, "w") as table:
                table.write(averages.table(sort_by=key, row_limit=100))


class AutogradProfiler(_Profiler):
    """Profiles chosen iterations with `torch.autograd.profiler` and writes them as Chrome traces."""

    def __init__(self, enable_predicate: Predicate, output_dir: str, *, use_cuda: bool = True) -> None:
        """
        Args:
            enable_predicate: called with the trainer before each iteration; True profiles it.
            output_dir: gets `profiler-trace-iter<iteration>.json`.
            use_cuda: whether to time the GPU as well, where there is one.
        """
        super().__init__(enable_predicate)
        self._folder = output_dir
        self._device = "cuda" if use_cuda and torch.cuda.is_available() else None

    def _make(self) -> torch.autograd.profiler.profile:
        return torch.autograd.profiler.profile(use_device=self._device)

    def _write(self, profiler: torch.autograd.profiler.profile) -> None:
        PathManager.mkdirs(self._folder)
        path = os.path.join(self._folder, f"profiler-trace-iter{self.trainer.iter}.json")
        profiler.export_chrome_trace(path)
        logger.info("Wrote a profile to %s", path)


class TorchMemoryStats(HookBase):
    """Logs the GPU memory in use, every so many iterations, a limited number of times."""

    def __init__(self, period: int = 20, max_runs: int = 10) -> None:
        """
        Args:
            period: in iterations.
            max_runs: how many times to log; the last time with torch's full summary.
        """
        self._period = period
        self._left = max_runs if torch.cuda.is_available() else 0

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self._left <= 0 or (done % self._period != 0 and done != self.trainer.max_iter):
            return
        self._left -= 1
        measures = {
            "max_reserved_mem": torch.cuda.max_memory_reserved(),
            "reserved_mem": torch.cuda.memory_reserved(),
            "max_allocated_mem": torch.cuda.max_memory_allocated(),
            "allocated_mem": torch.cuda.memory_allocated(),
        }
        text = ", ".join(f"{name}: {size / 2**20:.0f}MB" for name, size in measures.items())
        logger.info("iter: %d, %s", self.trainer.iter, text)
        if self._left == 0:
            logger.info("%s", torch.cuda.memory_summary())
        torch.cuda.memory.reset_peak_memory_stats()
