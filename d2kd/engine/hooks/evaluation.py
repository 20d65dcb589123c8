"""Evaluations between the steps; one that a killed run has begun is made when it is resumed."""

from collections.abc import Callable, Mapping
from typing import Any

from detectron2.engine.train_loop import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm


class EvaluationHook(HookBase):
    """Evaluates every `period` iterations and at the end, after the hooks that save.

    A checkpoint is written before the evaluation of its iteration and renewed after it, and says whether it has been
    made: a run that is resumed from one without makes it first, and goes on as the undisturbed run does.
    """

    def __init__(self, period: int, evaluate: Callable[[], Mapping[str, Any]]) -> None:
        """
        Args:
            period: iterations between evaluations; 0 evaluates at the end only.
            evaluate: returns the results, as Detectron2's evaluators give them.
        """
        self.period = period
        self.evaluate = evaluate
        #: the last iteration that was evaluated
        self.evaluated = -1

    def before_train(self) -> None:
        """Makes the evaluation that was due at the iteration that the run has been resumed from."""
        last = self.trainer.start_iter - 1
        if last < 0 or self.evaluated == last or not self._is_due(last):
            return
        self.trainer.iter = self.trainer.storage.iter = last
        self._evaluate()
        self.trainer.iter = self.trainer.storage.iter = last + 1

    def after_step(self) -> None:
        """Evaluates where it is due; the end is left to `after_train`."""
        if self._is_due(self.trainer.iter):
            self._evaluate()

    def after_train(self) -> None:
        """Evaluates at the end; a training that has ended early has been evaluated there."""
        if self.trainer.iter >= self.trainer.max_iter:
            self._put(self.evaluate())

    def _is_due(self, iteration: int) -> bool:
        done = iteration + 1
        return self.period > 0 and done % self.period == 0 and done < self.trainer.max_iter

    def _evaluate(self) -> None:
        self._put(self.evaluate())
        self.evaluated = self.trainer.iter
        self.trainer.after_evaluation()

    def _put(self, results: Mapping[str, Any]) -> None:
        if results:
            flat = {name: float(value) for name, value in flatten_results_dict(dict(results)).items()}
            self.trainer.storage.put_scalars(**flat, smoothing_hint=False)
        # processes that evaluate nothing wait here, not in a collective operation of the next iteration
        comm.synchronize()

    def state_dict(self) -> dict[str, int]:
        """The last iteration that was evaluated."""
        return {"evaluated": self.evaluated}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """The inverse of `state_dict`."""
        self.evaluated = state_dict["evaluated"]
