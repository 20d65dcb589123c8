"""A guard that lowers a method whose gradient opposes the task's for long."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2kd.config import declare_keys, get_key
from d2kd.settings import setting
from detectron2.config import CfgNode

#: Share of the old value that stays in the smoothed cosines at each measurement.
MOMENTUM = 0.9

declare_keys(
    "DISTILL.GUARD",
    ENABLED=setting(
        False,
        "Lower a method whose gradient on the shared taps opposes that of the task (smoothed cosine below 0) for long, "
        "and raise it again, up to its weight, when it does not for as long. Measured every BALANCE_PERIOD iterations.",
    ),
    PATIENCE=setting(200, "Iterations that are long.", at_least=1, iterations=True),
    FACTOR=setting(0.5, "What the weight is multiplied by each time, and divided by when it rises.", above=0, below=1),
)


class GuardState(NamedTuple):
    """What a guard remembers of M methods; never changed in place."""

    #: Smoothed cosines, (M,); NaN before the first measurement.
    cosines: Tensor
    #: Measurements in a row below 0, or as a negative number those that were not, (M,).
    counts: Tensor
    #: On the weights, (M,) in (0, 1].
    factors: Tensor


class GradientGuard:
    """Factors on the methods' weights, by the cosine of their gradients with the task's.

    After `patience` measurements in a row whose smoothed cosine is below 0 a factor is multiplied by `factor`; after as
    many that are not it is divided by it again, up to 1.
    """

    def __init__(self, methods: Sequence[str], patience: int, factor: float) -> None:
        """
        Args:
            methods: names of the methods.
            patience: measurements, at least 1.
            factor: between 0 and 1.
        """
        self.methods = list(methods)
        self.patience = patience
        self.factor = factor

    @classmethod
    def from_config(cls, cfg: CfgNode, methods: Sequence[str]) -> "GradientGuard | None":
        """Returns the guard that `DISTILL.GUARD` asks for, or None."""
        node = cfg.DISTILL.GUARD
        if not node.ENABLED:
            return None
        # a teacher may take part in some iterations only, and each batch of an iteration is measured
        every = get_key(cfg, "DISTILL.TEACHER.EVERY", 1)
        period = every * math.ceil(cfg.DISTILL.BALANCE_PERIOD / every)
        measurements = math.ceil(node.PATIENCE / period) * cfg.SOLVER.ACCUMULATE
        return cls(methods, measurements, node.FACTOR)

    def start(self) -> GuardState:
        """Returns the state before any measurement."""
        count = len(self.methods)
        return GuardState(torch.full((count,), float("nan")), torch.zeros(count, dtype=torch.int64), torch.ones(count))

    def updated(self, state: GuardState, cosines: Tensor, active: Tensor) -> GuardState:
        """Returns the state after a measurement.

        Args:
            state: before it.
            cosines: (M,); NaN where a gradient is 0 or overflows, which tells nothing.
            active: (M,) bool, the methods that have a weight now; the others stay as they are.
        """
        old, counts, factors = (x.to(cosines.device) for x in state)
        seen = active & cosines.isfinite()
        smoothed = torch.where(old.isnan(), cosines, torch.lerp(cosines, old, MOMENTUM))
        smoothed = torch.where(seen, smoothed, old)
        moved = torch.where(smoothed < 0, counts.clamp(min=0) + 1, counts.clamp(max=0) - 1)
        moved = torch.where(seen, moved, counts)
        lowers, rises = moved >= self.patience, (moved <= -self.patience) & (factors < 1)
        factors = torch.where(lowers, factors * self.factor, factors)
        factors = torch.where(rises, (factors / self.factor).clamp(max=1), factors)
        return GuardState(smoothed, torch.where(lowers | rises, 0, moved), factors)

    def state_dict(self, state: GuardState) -> dict[str, Any]:
        """Returns a state in plain types, with the patience that its counts are a part of."""
        return {**{name: value.tolist() for name, value in state._asdict().items()}, "patience": self.patience}

    def load(self, saved: Mapping[str, Any] | None) -> GuardState:
        """The inverse of `state_dict`; the start where nothing was saved.

        Where an iteration has another number of measurements now, counts are the same part of the patience.
        """
        if saved is None:
            return self.start()
        state = GuardState(*(torch.tensor(saved[n], dtype=x.dtype) for n, x in self.start()._asdict().items()))
        before = saved.get("patience", self.patience)
        return state._replace(counts=torch.div(state.counts * self.patience, before, rounding_mode="trunc"))
