"""Exponential moving average of the student's weights: a second, usually better student."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from d2kd.errors import ConfigError
from detectron2.config import CfgNode
from detectron2.engine.train_loop import HookBase


class ModelEMA:
    """theta' <- d theta' + (1 - d) theta after every step (Tarvainen and Valpola, "Mean teachers", 2017, equation 1).

    Running statistics are averaged like the weights; what is no floating-point number (counters) is copied.

    Attributes:
        model: the averaged model, in evaluation mode.
        updates: steps so far.
    """

    def __init__(self, live: nn.Module, decay: float, warmup: float = 0.0) -> None:
        """
        Args:
            live: the model that is trained.
            decay: d, 0 to 1, once warm.
            warmup: at step t, d is at most (1 + t) / (warmup + t).

        Raises:
            ConfigError: an argument is out of range.
        """
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"SOLVER.EMA.DECAY is {decay}; it must be at least 0 and less than 1.")
        if warmup < 0:
            raise ConfigError(f"SOLVER.EMA.WARMUP is {warmup}; it must not be negative.")
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self.model = copy.deepcopy(live).eval().requires_grad_(False)
        pairs = _tensor_pairs(self.model, live)
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def reset(self) -> None:
        """Begins anew with the live model's weights of now."""
        self.updates = 0
        _copy(self._averaged + self._copied)

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the live model's weights."""
        self.updates += 1
        if self._averaged:
            averages, live = map(list, zip(*self._averaged))
            torch._foreach_lerp_(averages, live, 1.0 - self.decay_at(self.updates))
        _copy(self._copied)

    def decay_at(self, step: int) -> float:
        """d at a step, counted from 1."""
        return min(self.decay, (1 + step) / (self.warmup + step))

    def state_dict(self) -> dict[str, Any]:
        """Averaged weights under "model", and the number of updates."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.model.load_state_dict(state_dict["model"])
        self.updates = int(state_dict["updates"])


class EMAHook(HookBase):
    """Updates a moving average after every step. Comes before the hook that saves."""

    def __init__(self, ema: ModelEMA) -> None:
        """
        Args:
            ema: of the model that the trainer trains.
        """
        self.ema = ema

    def after_step(self) -> None:
        """Takes in the weights."""
        self.ema.update()


def build_ema(cfg: CfgNode, student: nn.Module) -> ModelEMA | None:
    """Returns what `SOLVER.EMA` describes, None where it is off."""
    node = cfg.SOLVER.EMA
    return ModelEMA(student, node.DECAY, node.WARMUP) if node.ENABLED else None


def _tensor_pairs(average: nn.Module, live: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(average, live) of every parameter and saved buffer, each once, also where modules share one."""
    ours, theirs = average.state_dict(keep_vars=True), live.state_dict(keep_vars=True)
    pairs = {id(x): (x.detach(), theirs[name].detach()) for name, x in ours.items() if isinstance(x, Tensor)}
    return list(pairs.values())


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    if pairs:
        targets, sources = map(list, zip(*pairs))
        torch._foreach_copy_(targets, sources)
