"""The best checkpoint, and the end of a training that no longer gets better."""

import logging
import math
from collections.abc import Mapping
from typing import Any, Optional

from d2kd.errors import ConfigError, did_you_mean
from detectron2.config import CfgNode
from detectron2.engine.train_loop import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

logger = logging.getLogger(__name__)


class EarlyStop(BaseException):
    """Ends a training loop as a success; it is no `Exception`, so that no one reports a failure."""


class BestCheckpoint(HookBase):
    """Keeps the best weights by one metric as `model_best.pth`, and stops the training without a rise.

    All processes see the same metric, so they decide alike.
    `model_best.pth` holds weights only: a run is resumed from its last checkpoint, not from its best one.
    """

    def __init__(self, metric: str, patience: int = 0, min_delta: float = 0.0) -> None:
        """
        Args:
            metric: "<task>/<name>" of an evaluation's results, larger is better.
            patience: evaluations in a row without a rise that end the training; 0 never does.
            min_delta: a rise over the best so far by this or less does not count for `patience`.

        Raises:
            ConfigError: an argument is out of range.
        """
        if patience < 0 or min_delta < 0:
            raise ConfigError(
                f"TEST.EARLY_STOP.PATIENCE is {patience} and MIN_DELTA is {min_delta}; they must not be negative."
            )
        self.metric = metric
        self.patience = patience
        self.min_delta = min_delta
        self.best: float | None = None
        self.best_iter: int | None = None
        self._reference: float | None = None
        self._stale = 0

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Optional["BestCheckpoint"]:
        """The hook that `TEST.BEST_CHECKPOINT` and `TEST.EARLY_STOP` describe, or None where they are off.

        Raises:
            ConfigError: early stopping without a metric or without evaluations.
        """
        metric, stop = cfg.TEST.BEST_CHECKPOINT.METRIC, cfg.TEST.EARLY_STOP
        if stop.PATIENCE and not metric:
            raise ConfigError("TEST.EARLY_STOP.PATIENCE needs a metric to watch: set TEST.BEST_CHECKPOINT.METRIC.")
        if stop.PATIENCE and cfg.TEST.EVAL_PERIOD <= 0:
            raise ConfigError("TEST.EARLY_STOP.PATIENCE needs evaluations to count: set TEST.EVAL_PERIOD.")
        if metric and not cfg.DATASETS.TEST:
            raise ConfigError("TEST.BEST_CHECKPOINT.METRIC needs an evaluation: set DATASETS.TEST.")
        return cls(metric, stop.PATIENCE, stop.MIN_DELTA) if metric else None

    @property
    def exhausted(self) -> bool:
        """Whether there was no rise for `patience` evaluations."""
        return 0 < self.patience <= self._stale

    def judge(self, results: Mapping[str, Any]) -> None:
        """Takes an evaluation's results; all processes must call it, the main one's results count.

        Raises:
            ConfigError: the metric is not among them.
        """
        value = self._value(results)
        if not math.isnan(value) and (self.best is None or value > self.best):
            self.best, self.best_iter = value, self.trainer.iter
            self.trainer.save_best(self.describe())
        if not math.isnan(value) and (self._reference is None or value > self._reference + self.min_delta):
            self._reference, self._stale = value, 0
        else:
            self._stale += 1
        logger.info("%s is %.4f; the best is %s", self.metric, value, self.describe())

    def describe(self) -> dict[str, Any]:
        """Metric, best value and its iteration."""
        return {"metric": self.metric, "value": self.best, "iteration": self.best_iter}

    def state_dict(self) -> dict[str, Any]:
        """Best value so far and evaluations since."""
        names = ("metric", "best", "best_iter", "_reference", "_stale")
        return {name.strip("_"): getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; values of another metric are of no use and are dropped."""
        if state_dict["metric"] != self.metric:
            logger.warning("The checkpoint's best %s is forgotten: now it is %s.", state_dict["metric"], self.metric)
            return
        self.best, self.best_iter = state_dict["best"], state_dict["best_iter"]
        self._reference, self._stale = state_dict["reference"], state_dict["stale"]

    def _value(self, results: Mapping[str, Any]) -> float:
        flat = flatten_results_dict(dict(results)) if comm.is_main_process() else {}
        value, names = comm.all_gather((flat.get(self.metric), list(flat)))[0]
        if value is None:
            hint = did_you_mean(self.metric, names) or f" It gives {', '.join(names) or 'nothing'}."
            raise ConfigError(
                f"TEST.BEST_CHECKPOINT.METRIC is {self.metric!r}, which the evaluation does not give.{hint}"
            )
        return float(value)
