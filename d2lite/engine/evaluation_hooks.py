"""Hooks around evaluations: precise batch-norm statistics before, the evaluation, the best checkpoint after."""

import functools
import itertools
import logging
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from fvcore.common.checkpoint import Checkpointer
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats
from torch import nn

from d2lite.engine.trainer_base import HookBase, is_turn
from d2lite.evaluation.testing import flatten_results_dict
from d2lite.utils import comm
from d2lite.utils.events import EventStorage

logger = logging.getLogger(__name__)


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
        self._at_end = eval_after_train

    def after_step(self) -> None:
        # The evaluation at the end is left to after_train, behind the other hooks' last step.
        if is_turn(self.trainer, self._period, at_end=False):
            self._do_eval()

    def after_train(self) -> None:
        if self._at_end and self.trainer.iter >= self.trainer.max_iter:
            self._do_eval()
        # The function may hold a reference to the trainer and would keep it alive.
        del self._func

    def _do_eval(self) -> None:
        results = self._func()
        if results:
            self.trainer.storage.put_scalars(**_flatten_floats(results), smoothing_hint=False)
        # Processes that evaluate nothing wait here, not in a collective operation of the next iteration.
        comm.synchronize()


def _flatten_floats(results: Any) -> dict[str, float]:
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
    """Replaces batch normalization's moving averages by the statistics of many batches, before evaluations.

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
        self._loader = data_loader
        self._num_iter = num_iter
        self._period = period
        self._disabled = not get_bn_modules(model)
        if self._disabled:
            logger.info("PreciseBN is off: no batch-normalization layer is in training mode.")
        self._batches: Iterator[Any] | None = None

    def after_step(self) -> None:
        if is_turn(self.trainer, self._period, at_end=True):
            self.update_stats()

    def update_stats(self) -> None:
        """Computes the statistics and puts them into the model."""
        if self._disabled:
            return
        if self._batches is None:
            self._batches = iter(self._loader)
        # What the model reports during these passes is no part of the training.
        with EventStorage():
            logger.info("Running precise-BN for %d iterations; training continues afterward.", self._num_iter)
            update_bn_stats(self._model, itertools.islice(self._batches, self._num_iter), self._num_iter)


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
            ValueError: if `mode` is neither.
        """
        if mode not in ("max", "min"):
            raise ValueError(f"BestCheckpointer's mode must be 'max' or 'min', got '{mode}'.")
        self._period = eval_period
        self._metric = val_metric
        self._is_better = operator.gt if mode == "max" else operator.lt
        self._save = functools.partial(checkpointer.save, file_prefix)
        self.best_metric: float | None = None
        self.best_iter: int | None = None

    def after_step(self) -> None:
        if is_turn(self.trainer, self._period, at_end=False):
            self._save_if_best()

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            self._save_if_best()

    def _save_if_best(self) -> None:
        name, best = self._metric, self.best_metric
        latest = self.trainer.storage.latest().get(name)
        if latest is None:
            logger.warning("No metric '%s' to choose the best checkpoint by.", name)
            return
        value, iteration = latest
        if not math.isfinite(value):
            return
        if best is not None and not self._is_better(value, best):
            logger.info("%s: %.5f is not better than %.5f of iteration %d.", name, value, best, self.best_iter)
            return
        self.best_metric, self.best_iter = float(value), int(iteration)
        self._save(iteration=self.best_iter)
        logger.info("Saved the best model so far: %s is %.5f.", name, value)

    def state_dict(self) -> dict[str, Any]:
        """Returns the best value so far and its iteration."""
        return {"best_metric": self.best_metric, "best_iter": self.best_iter}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.best_metric, self.best_iter = state_dict["best_metric"], state_dict["best_iter"]
