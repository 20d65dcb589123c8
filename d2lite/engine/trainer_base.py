"""A loop of iterations, and the hooks that it calls around each."""

import logging
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from d2lite.utils.events import EventStorage

logger = logging.getLogger(__name__)


class HookBase:
    """Base class of callbacks at fixed points of the training loop.

    Each method is called by the trainer, in the order in which the hooks were registered. A hook finds the
    trainer as `self.trainer`.
    """

    trainer: "TrainerBase"
    """Set when the hook is registered; a weak reference."""

    def before_train(self) -> None:
        """Called once before the first iteration."""

    def after_train(self) -> None:
        """Called once after the last iteration, also when the training fails or is interrupted."""

    def before_step(self) -> None:
        """Called before each iteration."""

    def after_backward(self) -> None:
        """Called between the backward pass and the optimizer's step."""

    def after_step(self) -> None:
        """Called after each iteration."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what must be saved with the trainer; empty if nothing.

        A hook that returns something has a `load_state_dict` as well.
        """
        return {}


class TrainerBase:
    """Iterates `run_step` and calls hooks around it.

    Attributes:
        iter: the present iteration, from 0.
        start_iter: the iteration that this run started from.
        max_iter: the iteration to end before; equal to `iter` after a complete training.
        storage: holds the metrics while the training runs.
    """

    iter: int
    start_iter: int
    max_iter: int
    storage: EventStorage

    def __init__(self) -> None:
        self._hooks: list[HookBase] = []
        self.iter = 0
        self.start_iter = 0

    def register_hooks(self, hooks: Iterable[HookBase | None]) -> None:
        """Adds hooks after those that are there; None entries are skipped."""
        for hook in hooks:
            if hook is None:
                continue
            if not isinstance(hook, HookBase):
                raise TypeError(f"A hook must be a HookBase, got {type(hook).__name__}.")
            # A strong reference would form a cycle and keep a finished trainer and its GPU memory alive.
            hook.trainer = weakref.proxy(self)
            self._hooks.append(hook)

    def train(self, start_iter: int, max_iter: int) -> None:
        """Runs the iterations `start_iter` to `max_iter - 1`.

        Whatever ends the training is logged with its iteration; `after_train` is called in any case.
        """
        logger.info("Starting training from iteration %d", start_iter)
        self.start_iter, self.max_iter = start_iter, max_iter
        # after_train recognizes a complete training by iter >= max_iter.
        self.iter = start_iter
        self.storage = EventStorage(start_iter)
        with self.storage:
            try:
                self.before_train()
                while self.iter < max_iter:
                    self.before_step()
                    self.run_step()
                    self.after_step()
                    self.iter += 1
            except KeyboardInterrupt:
                logger.warning("Training was interrupted at iteration %d.", self.iter)
                raise
            except Exception:
                logger.exception("Exception during training, at iteration %d:", self.iter)
                raise
            finally:
                self.after_train()

    def before_train(self) -> None:
        """Calls the hooks' `before_train`."""
        for hook in self._hooks:
            hook.before_train()

    def after_train(self) -> None:
        """Calls the hooks' `after_train`."""
        self.storage.iter = self.iter
        for hook in self._hooks:
            hook.after_train()

    def before_step(self) -> None:
        """Calls the hooks' `before_step`."""
        self.storage.iter = self.iter
        for hook in self._hooks:
            hook.before_step()

    def after_backward(self) -> None:
        """Calls the hooks' `after_backward`."""
        for hook in self._hooks:
            hook.after_backward()

    def after_step(self) -> None:
        """Calls the hooks' `after_step`."""
        for hook in self._hooks:
            hook.after_step()

    def run_step(self) -> None:
        """Runs one iteration. Subclasses implement it."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Returns the last iteration and the state of every hook that has one, under its class name."""
        state: dict[str, Any] = {"iteration": self.iter}
        hooks: dict[str, Any] = {}
        for hook in self._hooks:
            name, hook_state = type(hook).__qualname__, hook.state_dict()
            if hook_state and name in hooks:
                logger.warning("Two hooks of class %s have a state; only that of the first is saved.", name)
            elif hook_state:
                hooks[name] = hook_state
        if hooks:
            state["hooks"] = hooks
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned; the hooks must have been registered."""
        self.iter = state_dict["iteration"]
        for name, hook_state in state_dict.get("hooks", {}).items():
            hook = next((hook for hook in self._hooks if type(hook).__qualname__ == name), None)
            if hook is None:
                logger.warning("Ignored the checkpoint's state of hook '%s', which is not in use.", name)
            else:
                hook.load_state_dict(hook_state)


def is_turn(trainer: TrainerBase, period: int, at_end: bool) -> bool:
    """Returns whether a period (0 is none) ends with this iteration; the training's end counts iff `at_end`."""
    done = trainer.iter + 1
    if done == trainer.max_iter:
        return at_end
    return period > 0 and done % period == 0
