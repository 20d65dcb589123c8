"""Common hooks: timing, metrics, learning rate and checkpoints; re-exports the others."""

import datetime
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from fvcore.common.checkpoint import PeriodicCheckpointer as _PeriodicCheckpointer
from fvcore.common.param_scheduler import ParamScheduler

from d2lite.engine.evaluation_hooks import BestCheckpointer, EvalHook, PreciseBN
from d2lite.engine.profiling import AutogradProfiler, TorchMemoryStats, TorchProfiler
from d2lite.engine.trainer_base import HookBase, TrainerBase, is_turn
from d2lite.solver import LRMultiplier
from d2lite.solver import LRScheduler as _LRScheduler
from d2lite.utils.events import EventWriter

__all__ = [
    "AutogradProfiler",
    "BestCheckpointer",
    "CallbackHook",
    "EvalHook",
    "IterationTimer",
    "LRScheduler",
    "PeriodicCheckpointer",
    "PeriodicWriter",
    "PreciseBN",
    "TorchMemoryStats",
    "TorchProfiler",
]

logger = logging.getLogger(__name__)

TrainerCallback = Callable[[TrainerBase], None]


class CallbackHook(HookBase):
    """Calls the given functions, each with the trainer."""

    def __init__(
        self,
        *,
        before_train: TrainerCallback | None = None,
        after_train: TrainerCallback | None = None,
        before_step: TrainerCallback | None = None,
        after_step: TrainerCallback | None = None,
    ) -> None:
        """
        Args:
            before_train, after_train, before_step, after_step: called with the trainer at that point.
        """
        points = {
            "before_train": before_train,
            "after_train": after_train,
            "before_step": before_step,
            "after_step": after_step,
        }
        self._functions = {point: function for point, function in points.items() if function is not None}

    def _call(self, point: str) -> None:
        if point in self._functions:
            self._functions[point](self.trainer)

    def before_train(self) -> None:
        self._call("before_train")

    def before_step(self) -> None:
        self._call("before_step")

    def after_step(self) -> None:
        self._call("after_step")

    def after_train(self) -> None:
        self._call("after_train")
        # The functions may hold references to the trainer and would keep it alive.
        self._functions.clear()


class IterationTimer(HookBase):
    """Records the seconds of each iteration as `time`, and logs the overall speed at the end."""

    def __init__(self, warmup_iter: int = 3) -> None:
        """
        Args:
            warmup_iter: timing starts with this iteration, from 1; those before are slower.
        """
        self._warmup = warmup_iter
        self._reset()

    def _reset(self) -> None:
        self._began = time.perf_counter()
        self._count, self._in_steps = 0, 0.0

    def before_train(self) -> None:
        self._reset()

    def before_step(self) -> None:
        self._step_began = time.perf_counter()

    def after_step(self) -> None:
        seconds = time.perf_counter() - self._step_began
        if self.trainer.iter - self.trainer.start_iter + 1 < self._warmup:
            self._reset()
        else:
            self._count += 1
            self._in_steps += seconds
            self.trainer.storage.put_scalars(time=seconds)

    def after_train(self) -> None:
        total, in_steps, count = time.perf_counter() - self._began, self._in_steps, self._count
        if count:
            pace = in_steps / count
            logger.info("Overall training speed: %d iterations in %s (%.4f s / it)", count, _duration(in_steps), pace)
        logger.info("Total training time: %s (%s on hooks)", _duration(total), _duration(total - in_steps))


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=int(seconds)))


class PeriodicWriter(HookBase):
    """Lets writers publish the metrics every so many iterations and at the end."""

    def __init__(self, writers: Sequence[EventWriter], period: int = 20) -> None:
        """
        Args:
            writers: each has `write` and `close`.
            period: in iterations.

        Raises:
            TypeError: if one of them is not an `EventWriter`.
        """
        for writer in writers:
            if not isinstance(writer, EventWriter):
                raise TypeError(f"PeriodicWriter needs EventWriters, got {type(writer).__name__}.")
        self._writers = list(writers)
        self._period = period

    def _write(self) -> None:
        for each in self._writers:
            each.write()

    def after_step(self) -> None:
        if is_turn(self.trainer, self._period, at_end=True):
            self._write()

    def after_train(self) -> None:
        # Other hooks may have added metrics, such as the last evaluation's.
        self._write()
        for each in self._writers:
            each.close()


class PeriodicCheckpointer(_PeriodicCheckpointer, HookBase):
    """fvcore's `PeriodicCheckpointer` as a hook: `model_<iteration>`, at the end `model_final`."""

    def before_train(self) -> None:
        self.max_iter = self.trainer.max_iter

    def after_step(self) -> None:
        self.step(self.trainer.iter)


class LRScheduler(HookBase):
    """Records the learning rate as `lr` and steps the schedule after each iteration."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: _LRScheduler | ParamScheduler | None = None,
    ) -> None:
        """
        Args:
            optimizer: None is the trainer's.
            scheduler: a torch scheduler, or an fvcore one, which multiplies the base learning rates over the
                whole training; None is the trainer's.
        """
        self._optimizer, self._scheduler = optimizer, scheduler

    def before_train(self) -> None:
        trainer, schedule = self.trainer, self.scheduler
        if self._optimizer is None:
            self._optimizer = trainer.optimizer
        if isinstance(schedule, ParamScheduler):
            self._scheduler = LRMultiplier(self._optimizer, schedule, trainer.max_iter, last_iter=trainer.iter - 1)
        self._group = self.get_best_param_group_id(self._optimizer)

    @staticmethod
    def get_best_param_group_id(optimizer: torch.optim.Optimizer) -> int:
        """Returns the index of the parameter group whose learning rate is most representative of the training.

        Where every group has one parameter, it is the first with the most frequent learning rate; else the
        group with the most parameters.
        """
        groups = optimizer.param_groups
        sizes = [len(group["params"]) for group in groups]
        if max(sizes) > 1:
            return sizes.index(max(sizes))
        rates = [group["lr"] for group in groups]
        return rates.index(Counter(rates).most_common(1)[0][0])

    def after_step(self) -> None:
        shown = self._optimizer.param_groups[self._group]
        self.trainer.storage.put_scalars(smoothing_hint=False, lr=shown["lr"])
        self.scheduler.step()

    @property
    def scheduler(self) -> _LRScheduler | ParamScheduler:
        """The scheduler in use."""
        return self.trainer.scheduler if self._scheduler is None else self._scheduler

    def state_dict(self) -> dict[str, Any]:
        """Returns the scheduler's state."""
        schedule = self.scheduler
        return schedule.state_dict() if isinstance(schedule, _LRScheduler) else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores the scheduler's state."""
        schedule = self.scheduler
        if isinstance(schedule, _LRScheduler):
            logger.info("Restoring the state of the learning-rate schedule ...")
            schedule.load_state_dict(state_dict)
