"""Hooks of the distillation trainer: checkpoints of all processes, interruption without loss, the run's result."""

import logging
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from d2kd.files import write_json
from d2kd.modeling.teacher_passes import TeacherClock
from detectron2.engine.train_loop import HookBase
from detectron2.utils import comm

from ..train_step import TrainStep

logger = logging.getLogger(__name__)

#: Seconds in which a signal counts as the one before: it reaches a process directly and from the one that started it.
_SAME_SIGNAL = 1.0


class Terminated(KeyboardInterrupt):
    """SIGTERM ends a run as Ctrl-C does, with the exit status of its own."""


class CheckpointHook(HookBase):
    """Saves every `period` iterations and at the end. Runs on all processes, for each has a random state of its own."""

    def __init__(self, period: int) -> None:
        """
        Args:
            period: iterations between checkpoints; 0 or less saves the final one only.
        """
        self.period = period

    def after_step(self) -> None:
        """Saves `model_<iteration>` or `model_final`."""
        done = self.trainer.iter + 1
        if done >= self.trainer.max_iter:
            self.trainer.save("model_final")
        elif self.period > 0 and done % self.period == 0:
            self.trainer.save(f"model_{self.trainer.iter:07d}")


class InterruptHook(HookBase):
    """Turns the first Ctrl-C or termination into: finish this iteration, save, stop. The second one stops at once.

    One process of many is enough: the steps carry its request to the others, so that all stop at the same iteration.
    """

    def __init__(self, step: TrainStep) -> None:
        """
        Args:
            step: the steps of the training.
        """
        self.step = step
        self._received: float | None = None
        self._number: int | None = None
        self._previous: dict[int, Any] = {}

    def before_train(self) -> None:
        """Installs the signal handlers; Python lets the main thread do that only."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)

    def after_train(self) -> None:
        """Puts the former handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def after_step(self) -> None:
        """Saves and stops if a signal has come.

        Raises:
            KeyboardInterrupt: after saving; `Terminated` where the signal was SIGTERM.
        """
        if not self.step.stop_agreed or self.trainer.iter + 1 >= self.trainer.max_iter:
            return
        self.trainer.save(f"model_{self.trainer.iter:07d}")
        logger.warning(
            "Stopped after iteration %d and saved; continue with --resume (in Python resume=True).", self.trainer.iter
        )
        raise self._interruption()

    def _handle(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received, self.step.stop_requested = now, True
            self._number = number
            name = signal.Signals(number).name
            logger.warning("%s: finishing this iteration, then saving. Again to stop at once.", name)
        elif now - self._received > _SAME_SIGNAL:
            raise self._interruption()

    def _interruption(self) -> KeyboardInterrupt:
        # a process that was asked through the steps has had no signal itself
        return Terminated() if self._number == signal.SIGTERM else KeyboardInterrupt()


class WallTime(HookBase):
    """Adds up the seconds spent in training steps, over resumed runs."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def before_step(self) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()

    def after_step(self) -> None:
        """Stops the clock."""
        self.seconds += time.perf_counter() - self._start
        if comm.is_main_process():
            self.trainer.storage.put_scalar("wall_time", self.seconds, smoothing_hint=False)

    def state_dict(self) -> dict[str, float]:
        """Seconds so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """The inverse of `state_dict`."""
        self.seconds = float(state_dict["seconds"])


class TeacherTime(HookBase):
    """Adds up the seconds of the training steps that the teacher takes, over resumed runs."""

    def __init__(self, clock: TeacherClock) -> None:
        """
        Args:
            clock: of the teacher's passes.
        """
        self.clock = clock
        self.seconds = 0.0

    def after_step(self) -> None:
        """Adds what was taken since the last step."""
        seconds = self.clock.take()
        self.seconds += seconds
        if comm.is_main_process():
            self.trainer.storage.put_scalar("teacher_time", seconds)

    def state_dict(self) -> dict[str, float]:
        """Seconds so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """The inverse of `state_dict`."""
        self.seconds = float(state_dict["seconds"])


class ResultWriter(HookBase):
    """Writes what a finished run came to as `result.json` into the output directory; until then there is none."""

    def __init__(self, path: str, describe: Callable[[], dict[str, Any]]) -> None:
        """
        Args:
            path: the file.
            describe: called after training; returns what to write.
        """
        self.path = path
        self.describe = describe

    def before_train(self) -> None:
        """Removes the result of an earlier run in the same directory."""
        if comm.is_main_process():
            Path(self.path).unlink(missing_ok=True)

    def after_train(self) -> None:
        """Writes the file, on the main process, if training came to its end."""
        if self.trainer.finished and comm.is_main_process():
            write_json(self.path, self.describe())
