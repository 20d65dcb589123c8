"""Learning-rate schedules: fvcore's schedules with warmup, driven by the iteration number."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    LinearParamScheduler,
    ParamScheduler,
)
from torch.optim.lr_scheduler import LRScheduler


class WarmupParamScheduler(CompositeParamScheduler):
    """A schedule whose first part is replaced by a warmup."""

    def __init__(
        self,
        scheduler: ParamScheduler,
        warmup_factor: float,
        warmup_length: float,
        warmup_method: str = "linear",
        rescale_interval: bool = False,
    ) -> None:
        """
        Args:
            scheduler: the schedule after the warmup.
            warmup_factor: the warmup starts at this times the schedule's first value.
            warmup_length: length of the warmup relative to the training, in [0, 1].
            warmup_method: "linear", up to the value where the schedule goes on, or "constant".
            rescale_interval: False cuts off the schedule's beginning; True squeezes the whole
                schedule into what follows the warmup.

        Raises:
            ValueError: if `warmup_method` is unknown.
        """
        start = warmup_factor * scheduler(0.0)
        end = scheduler(0.0) if rescale_interval else scheduler(warmup_length)
        if warmup_method == "linear":
            warmup: ParamScheduler = LinearParamScheduler(start, end)
        elif warmup_method == "constant":
            warmup = ConstantParamScheduler(start)
        else:
            raise ValueError(f"Unknown SOLVER.WARMUP_METHOD '{warmup_method}'; known are linear, constant.")
        super().__init__(
            [warmup, scheduler],
            lengths=[warmup_length, 1.0 - warmup_length],
            interval_scaling=["rescaled", "rescaled" if rescale_interval else "fixed"],
        )


class LRMultiplier(LRScheduler):
    """Multiplies each group's initial learning rate by a schedule; `step()` is called once per iteration.

    Unlike most torch schedulers it saves only its position, so a resumed run may change the schedule.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        multiplier: ParamScheduler,
        max_iter: int,
        last_iter: int = -1,
    ) -> None:
        """
        Args:
            optimizer: its groups' present learning rates are the base.
            multiplier: maps progress in [0, 1] to a factor.
            max_iter: number of iterations that make the progress 1.
            last_iter: the last iteration done, -1 for none.

        Raises:
            ValueError: if `multiplier` is not a `ParamScheduler`.
        """
        if not isinstance(multiplier, ParamScheduler):
            raise ValueError(f"multiplier must be an fvcore ParamScheduler, not {type(multiplier).__name__}.")
        self._multiplier = multiplier
        self._max_iter = max_iter
        super().__init__(optimizer, last_epoch=last_iter)

    def state_dict(self) -> dict[str, Any]:
        """Returns the base learning rates and the position; the schedule itself comes from the config."""
        return {"base_lrs": self.base_lrs, "last_epoch": self.last_epoch}

    def get_lr(self) -> list[float]:
        """Returns the learning rate of each parameter group for the present iteration."""
        factor = self._multiplier(self.last_epoch / self._max_iter)
        return [base_lr * factor for base_lr in self.base_lrs]


class _WarmupLR(LRScheduler):
    """Warmup multiplied with a decay, which subclasses define. Older interface; see `LRMultiplier`."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup_factor: float,
        warmup_iters: int,
        warmup_method: str,
        last_epoch: int,
    ) -> None:
        """
        Args:
            optimizer: its groups' present learning rates are the base.
            warmup_factor: factor at iteration 0.
            warmup_iters: number of warmup iterations.
            warmup_method: "linear" or "constant".
            last_epoch: the last iteration done, -1 for none.

        Raises:
            ValueError: if `warmup_method` is unknown.
        """
        self.warmup_factor = warmup_factor
        self.warmup_iters = warmup_iters
        self.warmup_method = warmup_method
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        """Returns the learning rate of each parameter group for the present iteration."""
        factor = _warmup_at(self.last_epoch, self.warmup_iters, self.warmup_factor, self.warmup_method)
        factor *= self._decay(self.last_epoch)
        return [base_lr * factor for base_lr in self.base_lrs]

    def _decay(self, iteration: int) -> float:
        raise NotImplementedError


class WarmupMultiStepLR(_WarmupLR):
    """Warmup, then a decay by `gamma` at each milestone."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        milestones: Sequence[int],
        gamma: float = 0.1,
        warmup_factor: float = 0.001,
        warmup_iters: int = 1000,
        warmup_method: str = "linear",
        last_epoch: int = -1,
    ) -> None:
        """
        Args:
            optimizer, warmup_factor, warmup_iters, warmup_method, last_epoch: see `_WarmupLR`.
            milestones: increasing iteration numbers.
            gamma: factor per milestone.

        Raises:
            ValueError: if the milestones do not increase.
        """
        if list(milestones) != sorted(milestones):
            raise ValueError(f"milestones must be increasing, got {list(milestones)}.")
        self.milestones = list(milestones)
        self.gamma = gamma
        super().__init__(optimizer, warmup_factor, warmup_iters, warmup_method, last_epoch)

    def _decay(self, iteration: int) -> float:
        return self.gamma ** bisect_right(self.milestones, iteration)


class WarmupCosineLR(_WarmupLR):
    """Warmup multiplied with a half cosine down to 0."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        max_iters: int,
        warmup_factor: float = 0.001,
        warmup_iters: int = 1000,
        warmup_method: str = "linear",
        last_epoch: int = -1,
    ) -> None:
        """
        Args:
            optimizer, warmup_factor, warmup_iters, warmup_method, last_epoch: see `_WarmupLR`.
            max_iters: the iteration where the learning rate reaches 0.
        """
        self.max_iters = max_iters
        super().__init__(optimizer, warmup_factor, warmup_iters, warmup_method, last_epoch)

    def _decay(self, iteration: int) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * iteration / self.max_iters))


def _warmup_at(iteration: int, warmup_iters: int, warmup_factor: float, method: str) -> float:
    if method not in ("linear", "constant"):
        raise ValueError(f"Unknown warmup_method '{method}'; known are linear, constant.")
    if iteration >= warmup_iters:
        return 1.0
    if method == "constant":
        return warmup_factor
    progress = iteration / warmup_iters
    return warmup_factor + (1.0 - warmup_factor) * progress
