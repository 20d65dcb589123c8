"""Hooks that most trainings use: timing, metrics, learning rate, checkpoints, evaluation, batch norm."""

import datetime
import itertools
import logging
import math
import operator
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from fvcore.common.checkpoint import Checkpointer
from fvcore.common.checkpoint import PeriodicCheckpointer as _PeriodicCheckpointer
from fvcore.common.param_scheduler import ParamScheduler
from fvcore.common.timer import Timer
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats
from torch import nn

from d2lite.engine.profiling import AutogradProfiler, TorchMemoryStats, TorchProfiler
from d2lite.engine.train_loop import HookBase, TrainerBase
from d2lite.evaluation.testing import flatten_results_dict
from d2lite.solver import LRMultiplier
from d2lite.solver import LRScheduler as _LRScheduler
from d2lite.utils import comm
from d2lite.utils.events import EventStorage, EventWriter

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
        self._before_train = before_train
        self._before_step = before_step
        self._after_step = after_step
        self._after_train = after_train

    def before_train(self) -> None:
        if self._before_train:
            self._before_train(self.trainer)

    def before_step(self) -> None:
        if self._before_step:
            self._before_step(self.trainer)

    def after_step(self) -> None:
        if self._after_step:
            self._after_step(self.trainer)

    def after_train(self) -> None:
        if self._after_train:
            self._after_train(self.trainer)
        # The functions may hold the trainer, which would keep it alive.
        self._before_train = self._after_train = self._before_step = self._after_step = None


class IterationTimer(HookBase):
    """Records the seconds of each iteration as ``time``, and logs the overall speed at the end."""

    def __init__(self, warmup_iter: int = 3) -> None:
        """
        Args:
            warmup_iter: timing starts with this iteration, from 1; those before are slower.
        """
        self._warmup_iter = warmup_iter
        self._step_timer = Timer()
        self._total_timer = Timer()
        self._start_time = time.perf_counter()
        self._counted = 0

    def before_train(self) -> None:
        self._start_time = time.perf_counter()
        self._total_timer.reset()
        self._total_timer.pause()

    def before_step(self) -> None:
        self._step_timer.reset()
        self._total_timer.resume()

    def after_step(self) -> None:
        done = self.trainer.iter - self.trainer.start_iter + 1
        if done >= self._warmup_iter:
            self._counted += 1
            self.trainer.storage.put_scalars(time=self._step_timer.seconds())
        else:
            self._start_time = time.perf_counter()
            self._total_timer.reset()
        self._total_timer.pause()

    def after_train(self) -> None:
        total = time.perf_counter() - self._start_time
        in_steps = self._total_timer.seconds()
        if self._counted > 0 and in_steps > 0:
            logger.info(
                "Overall training speed: %d iterations in %s (%.4f s / it)",
                self._counted,
                _duration(in_steps),
                in_steps / self._counted,
            )
        logger.info("Total training time: %s (%s on hooks)", _duration(total), _duration(total - in_steps))


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=int(seconds)))


class PeriodicWriter(HookBase):
    """Lets writers publish the metrics every so many iterations and at the end."""

    def __init__(self, writers: Sequence[EventWriter], period: int = 20) -> None:
        """
        Args:
            writers: each has ``write`` and ``close``.
            period: in iterations.

        Raises:
            TypeError: if one of them is no ``EventWriter``.
        """
        for writer in writers:
            if not isinstance(writer, EventWriter):
                raise TypeError(f"PeriodicWriter needs EventWriters, got {type(writer).__name__}.")
        self._writers = list(writers)
        self._period = period

    def after_step(self) -> None:
        if _is_turn(self.trainer, self._period, at_end=True):
            for writer in self._writers:
                writer.write()

    def after_train(self) -> None:
        for writer in self._writers:
            # Other hooks may have added metrics, such as the last evaluation's.
            writer.write()
            writer.close()


def _is_turn(trainer: TrainerBase, period: int, at_end: bool) -> bool:
    """Whether a period (0 is none) ends with this iteration; the training's end counts iff ``at_end``."""
    done = trainer.iter + 1
    if done == trainer.max_iter:
        return at_end
    return period > 0 and done % period == 0


class PeriodicCheckpointer(_PeriodicCheckpointer, HookBase):
    """fvcore's ``PeriodicCheckpointer`` as a hook: ``model_<iteration>``, at the end ``model_final``."""

    def before_train(self) -> None:
        self.max_iter = self.trainer.max_iter

    def after_step(self) -> None:
        self.step(self.trainer.iter)


class BestCheckpointer(HookBase):
    """Saves a checkpoint whenever an evaluation is the best so far; register it after the evaluation."""

    def __init__(
        self,
        eval_period: int,
        checkpointer: Checkpointer,
        val_metric: str,
        mode: str = "max",
        file_prefix: str = "model_best",
    ) -> None:
        """
        Args:
            eval_period: that of the evaluation, in iterations.
            checkpointer: saves.
            val_metric: name of the metric in the event storage, such as "bbox/AP50".
            mode: "max" or "min".
            file_prefix: name of the checkpoint.

        Raises:
            ValueError: if ``mode`` is neither.
        """
        if mode not in ("max", "min"):
            raise ValueError(f"BestCheckpointer's mode must be 'max' or 'min', got '{mode}'.")
        self._period = eval_period
        self._checkpointer = checkpointer
        self._val_metric = val_metric
        self._is_better = operator.gt if mode == "max" else operator.lt
        self._file_prefix = file_prefix
        self.best_metric: float | None = None
        self.best_iter: int | None = None

    def after_step(self) -> None:
        if _is_turn(self.trainer, self._period, at_end=False):
            self._save_if_best()

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            self._save_if_best()

    def _save_if_best(self) -> None:
        latest = self.trainer.storage.latest().get(self._val_metric)
        if latest is None:
            logger.warning("No metric '%s' to choose the best checkpoint by.", self._val_metric)
            return
        metric, iteration = latest
        if not math.isfinite(metric):
            return
        if self.best_metric is not None and not self._is_better(metric, self.best_metric):
            logger.info(
                "%s: %.5f is not better than %.5f of iteration %d.",
                self._val_metric,
                metric,
                self.best_metric,
                self.best_iter,
            )
            return
        self.best_metric, self.best_iter = float(metric), int(iteration)
        self._checkpointer.save(self._file_prefix, iteration=self.best_iter)
        logger.info("Saved the best model so far: %s is %.5f.", self._val_metric, metric)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value so far and its iteration."""
        return {"best_metric": self.best_metric, "best_iter": self.best_iter}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.best_metric, self.best_iter = state_dict["best_metric"], state_dict["best_iter"]


class LRScheduler(HookBase):
    """Records the learning rate as ``lr`` and moves the schedule on after each iteration."""

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
        self._optimizer = optimizer
        self._scheduler = scheduler

    def before_train(self) -> None:
        self._optimizer = self._optimizer or self.trainer.optimizer
        if isinstance(self.scheduler, ParamScheduler):
            self._scheduler = LRMultiplier(
                self._optimizer, self.scheduler, self.trainer.max_iter, last_iter=self.trainer.iter - 1
            )
        self._group = self.get_best_param_group_id(self._optimizer)

    @staticmethod
    def get_best_param_group_id(optimizer: torch.optim.Optimizer) -> int:
        """
        Return the index of the parameter group whose learning rate says most about the training.

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
        lr = self._optimizer.param_groups[self._group]["lr"]
        self.trainer.storage.put_scalar("lr", lr, smoothing_hint=False)
        self.scheduler.step()

    @property
    def scheduler(self) -> _LRScheduler | ParamScheduler:
        """The scheduler in use."""
        return self._scheduler or self.trainer.scheduler

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's state."""
        return self.scheduler.state_dict() if isinstance(self.scheduler, _LRScheduler) else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the scheduler's state."""
        if isinstance(self.scheduler, _LRScheduler):
            logger.info("Loading scheduler from state_dict ...")
            self.scheduler.load_state_dict(state_dict)


class EvalHook(HookBase):
    """Calls an evaluation function every so many iterations and at the end, and records what it returns."""

    def __init__(
        self,
        eval_period: int,
        eval_function: Callable[[], Mapping[str, Any] | None],
        eval_after_train: bool = True,
    ) -> None:
        """
        Args:
            eval_period: in iterations; 0 evaluates at the end only. All processes must use the same.
            eval_function: takes no arguments; returns a nested dict of numbers, or nothing.
            eval_after_train: whether to evaluate at the end.
        """
        self._period = eval_period
        self._func = eval_function
        self._eval_after_train = eval_after_train

    def after_step(self) -> None:
        # The evaluation at the end is left to after_train, behind the other hooks' last step.
        if _is_turn(self.trainer, self._period, at_end=False):
            self._do_eval()

    def after_train(self) -> None:
        if self._eval_after_train and self.trainer.iter >= self.trainer.max_iter:
            self._do_eval()
        # The function is likely to hold the trainer, which would keep it alive.
        del self._func

    def _do_eval(self) -> None:
        results = self._func()
        if results:
            self.trainer.storage.put_scalars(**_flat_floats(results), smoothing_hint=False)
        # Processes that evaluate nothing wait here, not in a collective operation of the next iteration.
        comm.synchronize()


def _flat_floats(results: Any) -> dict[str, float]:
    if not isinstance(results, Mapping):
        raise TypeError(f"[EvalHook] eval_function must return a dict, got {type(results).__name__}.")
    flat = {}
    for name, value in flatten_results_dict(results).items():
        try:
            flat[name] = float(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"[EvalHook] eval_function must return a nested dict of numbers, got '{name}: {value}'."
            ) from None
    return flat


class PreciseBN(HookBase):
    """
    Replaces batch normalisation's moving averages by the statistics of many batches, before evaluations.

    Only layers in training mode are touched (Wu and Johnson, "Rethinking 'Batch' in BatchNorm", section 3).
    """

    def __init__(self, period: int, model: nn.Module, data_loader: Iterable[Any], num_iter: int) -> None:
        """
        Args:
            period: in iterations; 0 runs at the end only. All processes must use the same.
            model: layers of it are updated in place.
            data_loader: yields training batches.
            num_iter: number of batches to average over.
        """
        self._model = model
        self._data_loader = data_loader
        self._num_iter = num_iter
        self._period = period
        self._disabled = not get_bn_modules(model)
        if self._disabled:
            logger.info("PreciseBN is off: no batch-normalisation layer is in training mode.")
        self._data_iter: Iterator[Any] | None = None

    def after_step(self) -> None:
        if _is_turn(self.trainer, self._period, at_end=True):
            self.update_stats()

    def update_stats(self) -> None:
        """Compute the statistics and put them into the model."""
        if self._disabled:
            return
        if self._data_iter is None:
            self._data_iter = iter(self._data_loader)
        # What the model reports during these passes is no part of the training.
        with EventStorage():
            logger.info("Running precise-BN for %d iterations; training goes on after that.", self._num_iter)
            update_bn_stats(self._model, itertools.islice(self._data_iter, self._num_iter), self._num_iter)
