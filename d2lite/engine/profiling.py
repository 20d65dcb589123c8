"""Hooks that profile the training and watch GPU memory."""

import logging
import os
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile, tensorboard_trace_handler

from d2lite.engine.trainer_base import HookBase, TrainerBase
from d2lite.utils.file_io import PathManager

logger = logging.getLogger(__name__)

Predicate = Callable[[TrainerBase], bool]


class TorchProfiler(HookBase):
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
        if activities is None:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
        self._enable_predicate = enable_predicate
        self._activities = list(activities)
        self._log_dir = os.path.join(output_dir, "log")
        self._save_tensorboard = save_tensorboard
        self._profiler: profile | None = None

    def before_step(self) -> None:
        if not self._enable_predicate(self.trainer):
            return
        handler = None
        if self._save_tensorboard:
            worker = f"profiler-tensorboard-iter{self.trainer.iter}"
            handler = tensorboard_trace_handler(self._log_dir, worker)
        self._profiler = profile(
            activities=self._activities,
            on_trace_ready=handler,
            record_shapes=True,
            profile_memory=True,
            with_stack=True,
            with_flops=True,
        )
        self._profiler.__enter__()

    def after_step(self) -> None:
        if self._profiler is None:
            return
        self._profiler.__exit__(None, None, None)
        averages = self._profiler.key_averages()
        PathManager.mkdirs(self._log_dir)
        for key in self._sort_keys():
            path = os.path.join(self._log_dir, f"profiler-{key}-iter{self.trainer.iter}.txt")
            with PathManager.open(path, "w") as f:
                f.write(averages.table(sort_by=key, row_limit=100))
        self._profiler = None

    def _sort_keys(self) -> list[str]:
        on_gpu = ProfilerActivity.CUDA in self._activities
        return ["cpu_time_total", "device_time_total"] if on_gpu else ["cpu_time_total"]


class AutogradProfiler(HookBase):
    """Profiles chosen iterations with `torch.autograd.profiler` and writes them as Chrome traces."""

    def __init__(self, enable_predicate: Predicate, output_dir: str, *, use_cuda: bool = True) -> None:
        """
        Args:
            enable_predicate: called with the trainer before each iteration; True profiles it.
            output_dir: gets `profiler-trace-iter<iteration>.json`.
            use_cuda: whether to time the GPU as well, where there is one.
        """
        self._enable_predicate = enable_predicate
        self._output_dir = output_dir
        self._use_device = "cuda" if use_cuda and torch.cuda.is_available() else None
        self._profiler: torch.autograd.profiler.profile | None = None

    def before_step(self) -> None:
        if self._enable_predicate(self.trainer):
            self._profiler = torch.autograd.profiler.profile(use_device=self._use_device)
            self._profiler.__enter__()

    def after_step(self) -> None:
        if self._profiler is None:
            return
        self._profiler.__exit__(None, None, None)
        PathManager.mkdirs(self._output_dir)
        path = os.path.join(self._output_dir, f"profiler-trace-iter{self.trainer.iter}.json")
        self._profiler.export_chrome_trace(path)
        logger.info("Wrote a profile to %s", path)
        self._profiler = None


class TorchMemoryStats(HookBase):
    """Logs the GPU memory in use, every so many iterations, a limited number of times."""

    def __init__(self, period: int = 20, max_runs: int = 10) -> None:
        """
        Args:
            period: in iterations.
            max_runs: how many times to log; the last time with torch's full summary.
        """
        self._period = period
        self._max_runs = max_runs
        self._runs = 0

    def after_step(self) -> None:
        if not torch.cuda.is_available() or self._runs >= self._max_runs:
            return
        done = self.trainer.iter + 1
        if done % self._period != 0 and done != self.trainer.max_iter:
            return
        self._runs += 1
        measures = {
            "max_reserved_mem": torch.cuda.max_memory_reserved(),
            "reserved_mem": torch.cuda.memory_reserved(),
            "max_allocated_mem": torch.cuda.max_memory_allocated(),
            "allocated_mem": torch.cuda.memory_allocated(),
        }
        text = ", ".join(f"{name}: {size / 2**20:.0f}MB" for name, size in measures.items())
        logger.info("iter: %d, %s", self.trainer.iter, text)
        if self._runs == self._max_runs:
            logger.info("%s", torch.cuda.memory_summary())
        torch.cuda.reset_peak_memory_stats()
