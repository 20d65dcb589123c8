"""The evaluation loop: runs a model over a dataset and passes its predictions to evaluators."""

import datetime
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import nn

from d2lite.utils import comm
from d2lite.utils.logger import log_every_n_seconds

logger = logging.getLogger(__name__)

NUM_WARMUP = 5  # iterations that the reported times leave out


class DatasetEvaluator:
    """Collects inputs and outputs of a model, and turns them into metrics at the end. To be subclassed."""

    def reset(self) -> None:
        """Discards everything collected so far."""

    def process(self, inputs: Iterable[Any], outputs: Iterable[Any]) -> None:
        """Takes the inputs of one call of the model and its outputs, item by item in the same order."""

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Returns `{task: {metric: value}}`, or None on the processes that gathered nothing."""


class DatasetEvaluators(DatasetEvaluator):
    """Several evaluators that see the same outputs; their results are merged and must not share a task."""

    def __init__(self, evaluators: Sequence[DatasetEvaluator]) -> None:
        super().__init__()
        self._parts = list(evaluators)

    def reset(self) -> None:
        for part in self._parts:
            part.reset()

    def process(self, inputs: Iterable[Any], outputs: Iterable[Any]) -> None:
        for part in self._parts:
            part.process(inputs, outputs)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """
        Raises:
            AssertionError: if two evaluators report the same task.
        """
        # each in every process: evaluators gather there
        reports = [part.evaluate() or {} for part in self._parts]
        results = OrderedDict()
        if comm.is_main_process():
            for task, metrics in chain.from_iterable(report.items() for report in reports):
                if task in results:
                    raise AssertionError(f"Two evaluators report results for the same task {task!r}")
                results[task] = metrics
        return results


def inference_on_dataset(
    model: Callable[[Any], Any],
    data_loader: Iterable[Any],
    evaluator: DatasetEvaluator | list[DatasetEvaluator] | None,
    callbacks: dict[str, Callable[[], Any]] | None = None,
) -> dict[str, dict[str, float]]:
    """Runs `model` over `data_loader` without gradient, in eval mode, and evaluates its outputs.

    Args:
        model: called with each batch. If it is an `nn.Module`, its training mode is restored afterward.
        data_loader: must have a length.
        evaluator: one, several, or None to run the model only (to measure its speed).
        callbacks: called at `on_start`, `before_inference`, `after_inference` (every batch) and
            `on_end`.

    Returns:
        What the evaluator returns, or an empty dict where it returns None.
    """
    total = len(data_loader)  # a loader without a length is an error before any work is done
    logger.info("Start inference on %d batches", total)
    if not isinstance(evaluator, DatasetEvaluator):
        evaluator = DatasetEvaluators(evaluator or [])
    evaluator.reset()
    call, on_gpu = _Callbacks(callbacks), torch.cuda.is_available()
    mode = inference_context(model) if isinstance(model, nn.Module) else nullcontext()
    with mode, torch.no_grad():
        timer = _StageTimer(total)
        call("on_start")
        for inputs in data_loader:
            timer.lap("data")
            call("before_inference")
            outputs = model(inputs)
            if on_gpu:
                torch.cuda.synchronize()
            call("after_inference")
            timer.lap("inference")
            evaluator.process(inputs, outputs)
            timer.lap("eval")
            timer.finish_iteration()
        call("on_end")
    timer.log_total()
    return evaluator.evaluate() or {}


@contextmanager
def inference_context(model: nn.Module) -> Iterator[None]:
    """Puts `model` in eval mode, and back in the mode it was in at the end."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class _Callbacks:
    def __init__(self, callbacks: dict[str, Callable[[], Any]] | None) -> None:
        self.callbacks = callbacks or {}

    def __call__(self, name: str) -> None:
        self.callbacks.get(name, lambda: None)()


class _StageTimer:
    """Accumulates the seconds spent in each stage of the loop, and logs progress with the time left."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.warmup = min(NUM_WARMUP, max(total - 1, 0))
        self.done = 0
        self.started = self.last = time.perf_counter()
        self.seconds = dict.fromkeys(("data", "inference", "eval"), 0.0)

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] += now - self.last
        self.last = now

    def finish_iteration(self) -> None:
        self.done += 1
        if self.done == self.warmup:
            self.started = self.last
            self.seconds = dict.fromkeys(self.seconds, 0.0)
        elif self.done > self.warmup:
            self._log_progress()

    def _log_progress(self) -> None:
        iterations = self.done - self.warmup
        per_iteration = (self.last - self.started) / iterations
        left = datetime.timedelta(seconds=int(per_iteration * (self.total - self.done)))
        data, inference, evaluation = (self.seconds[s] / iterations for s in ("data", "inference", "eval"))
        message = (
            f"Inference done {self.done}/{self.total}. Dataloading: {data:.4f} s/iter. "
            f"Inference: {inference:.4f} s/iter. Eval: {evaluation:.4f} s/iter. "
            f"Total: {per_iteration:.4f} s/iter. ETA={left}"
        )
        log_every_n_seconds(logging.INFO, message, n=5, name=__name__)

    def log_total(self) -> None:
        iterations = self.done - self.warmup
        if iterations <= 0:
            return
        for label, seconds in (
            ("Total inference time", self.last - self.started),
            ("Total inference pure compute time", self.seconds["inference"]),
        ):
            duration = datetime.timedelta(seconds=int(seconds))
            devices = comm.get_world_size()
            per_iteration = seconds / iterations
            logger.info("%s: %s (%.6f s / iter on %d devices)", label, duration, per_iteration, devices)
