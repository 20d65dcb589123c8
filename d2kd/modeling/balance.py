"""How strongly each method pulls at the student: its gradient on the shared taps, measured, logged and balanced."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from d2kd.config import get_key
from d2kd.errors import UserError
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from .guard import GradientGuard

logger = logging.getLogger(__name__)

TASK = "task"
#: Share of the old value that stays in the smoothed norms at each measurement.
MOMENTUM = 0.9
#: Loss scale for float16, with the words of `torch.amp.GradScaler`: halved whenever a gradient overflows, doubled again
#: (up to the first value) after `GROWTH_INTERVAL` measurements without.
INIT_SCALE, GROWTH_INTERVAL = 2.0**16, 100

Losses = Mapping[str, Tensor]


class BalanceError(UserError):
    """A way of balancing that is impossible."""


class GradientBalance:
    """Measures gradients on tapped features, logs their shares, and scales methods to a ratio to the task's gradient.

    The norms are those over the features of all processes, so shares and scales are equal on all of them. The features
    are not parameters: measuring leaves no gradient behind, and a data-parallel wrapper does not see it. A measurement
    costs one backward pass for the task and for each method, through what lies behind the features only.
    """

    def __init__(
        self,
        methods: Sequence[str],
        *,
        ratio: float | None = None,
        limits: bool = False,
        guard: GradientGuard | None = None,
        period: int = 10,
        log_period: int = 0,
        every: int = 1,
    ) -> None:
        """
        Args:
            methods: names of the methods.
            ratio: gradient norm of each method over the task's, above 0; None leaves the losses as they are.
            limits: whether the ratio is a limit only: no method is scaled up.
            guard: lowers methods whose gradient opposes the task's; None lowers none.
            period: iterations between measurements, where there is a ratio or a guard.
            log_period: iterations between logs of the shares; 0 = never.
            every: of the training's iterations it is called in every n-th one only, and counts these.
        """
        self.methods = list(methods)
        self.ratio = ratio
        self.limits = limits
        self.guard = guard
        self.period = period
        self.log_period = log_period
        self.every = every
        # smoothed norms of the task and of each method before scaling
        self._norms = torch.full((1 + len(self.methods),), float("nan"))
        self._measured = False
        self._loss_scale = torch.tensor(INIT_SCALE)
        # measurements in a row without overflow
        self._growth_tracker = torch.tensor(0)
        self._guard_state = None if guard is None else guard.start()

    @classmethod
    def from_config(cls, cfg: CfgNode, methods: Sequence[str]) -> Optional["GradientBalance"]:
        """What `DISTILL.BALANCE`, `GUARD` and `LOG_GRADIENT_SHARE` ask for; None if that is nothing.

        Raises:
            BalanceError: they compare with the task's gradient, which has no weight.
        """
        node = cfg.DISTILL
        ratio = None if node.BALANCE == "fixed" else node.BALANCE_RATIO
        guard = GradientGuard.from_config(cfg, methods)
        if not methods or (ratio is None and guard is None and node.LOG_GRADIENT_SHARE == 0):
            return None
        if node.TASK_WEIGHT == 0 and (ratio is not None or guard is not None):
            key, off = ("DISTILL.BALANCE", '"fixed"') if ratio is not None else ("DISTILL.GUARD.ENABLED", "False")
            raise BalanceError(
                f"{key} compares methods with the task, and DISTILL.TASK_WEIGHT is 0: set it above 0, or {key} to "
                f"{off}."
            )
        every = get_key(cfg, "DISTILL.TEACHER.EVERY", 1)
        periods = {"period": node.BALANCE_PERIOD, "log_period": node.LOG_GRADIENT_SHARE}
        periods = {name: math.ceil(period / every) for name, period in periods.items()}
        return cls(methods, ratio=ratio, limits=node.BALANCE == "limit", guard=guard, every=every, **periods)

    def __call__(
        self,
        task: Losses,
        methods: Mapping[str, Losses],
        features: Sequence[Tensor],
        factors: Mapping[str, float] | None = None,
    ) -> dict[str, dict[str, Tensor]]:
        """
        Args:
            task: the student's own losses.
            methods: losses of each method.
            features: of the student, any shapes.
            factors: that the caller puts on what is returned, by method, where they are not 1: the logged shares tell
                of them, and the norms of a method at 0 stay as they were.

        Returns:
            The losses of each method, scaled where there is a ratio.
        """
        iteration = get_event_storage().iter // self.every
        log = self.log_period > 0 and iteration % self.log_period == 0
        due = iteration % self.period == 0
        update, guards = self.ratio is not None and (due or not self._measured), self.guard is not None and due
        terms = [task, *(methods[name] for name in self.methods)]
        norms, cosines = self._measure(terms, features, guards) if log or update or guards else (None, None)
        given = _filled([1.0, *((factors or {}).get(name, 1.0) for name in self.methods)], features[0].device)
        if norms is not None and update:
            self._update(norms, given > 0)
        if cosines is not None:
            self._watch(cosines, given[1:] > 0)
        scales = self.scales()
        if norms is not None and log:
            self._log(norms, scales, given)
        if self.ratio is None and self._guard_state is None:
            return {name: dict(losses) for name, losses in methods.items()}
        return {
            name: {key: loss * scale for key, loss in methods[name].items()}
            for name, scale in zip(self.methods, scales)
        }

    def scales(self) -> Tensor:
        """Factor on each method's losses, (M,): by the ratio, where method and task have a gradient, and the guard."""
        scales = torch.ones_like(self._norms[1:])
        if self.ratio is not None:
            by_ratio = self.ratio * self._norms[0] / self._norms[1:]
            by_ratio = by_ratio.clamp(max=1.0) if self.limits else by_ratio
            scales = torch.where(torch.isfinite(by_ratio) & (by_ratio > 0), by_ratio, scales)
        return scales if self._guard_state is None else scales * self._guard_state.factors.to(scales.device)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        state: dict[str, Any] = {
            "methods": self.methods,
            "norms": self._norms.tolist(),
            "loss_scale": self._loss_scale.item(),
            "steady": self._growth_tracker.item(),
        }
        if self.guard is not None and self._guard_state is not None:
            state["guard"] = self.guard.state_dict(self._guard_state)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`.

        Raises:
            BalanceError: the state is that of other methods.
        """
        if list(state["methods"]) != self.methods:
            raise BalanceError(
                f"The state of the balance is that of {state['methods']}, and DISTILL.METHODS is {self.methods}."
            )
        self._norms = torch.tensor(state["norms"])
        self._loss_scale = torch.tensor(state["loss_scale"])
        self._growth_tracker = torch.tensor(state.get("steady", 0))
        self._measured = bool(self._norms.isfinite().all())
        if self.guard is not None:
            self._guard_state = self.guard.load(state.get("guard"))

    def measure(self, terms: Sequence[Losses], features: Sequence[Tensor]) -> Tensor:
        """Returns gradient norms of the terms, (len(terms),), of all processes; not finite where float16 overflows."""
        return self._measure(terms, features)[0]

    def _measure(
        self, terms: Sequence[Losses], features: Sequence[Tensor], with_cosines: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Gradient norms, and if asked for the cosines of all gradients but the first with that one."""
        # a view may branch off from what the model goes on with; its base never does
        features = [x if x._base is None else x._base for x in features if x.requires_grad]
        if not features:
            raise BalanceError(
                "DISTILL.BALANCE and DISTILL.LOG_GRADIENT_SHARE need a tapped feature that has a gradient, and all are "
                "frozen (MODEL.BACKBONE.FREEZE_AT)."
            )
        device = features[0].device
        self._norms, self._loss_scale = self._norms.to(device), self._loss_scale.to(device)
        half = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16
        loss_scale = self._loss_scale if half else torch.ones_like(self._loss_scale)
        with torch.autocast(device.type, enabled=False):
            first = _gradients(terms[0], features, loss_scale)
            if all(x is None for x in first) and (self.ratio is not None or self.guard is not None):
                raise BalanceError(
                    "DISTILL.BALANCE and DISTILL.GUARD compare methods with the task, and no loss of the task depends "
                    "on the tapped features: choose taps that lead to predictions."
                )
            squares = [_squared_norm(first, features)]
            products = []
            for losses in terms[1:]:
                gradients = _gradients(losses, features, loss_scale)
                squares.append(_squared_norm(gradients, features))
                products += [_product(first, gradients, features)] if with_cosines else []
            sums = torch.stack([*squares, *products])
        if comm.get_world_size() > 1:
            dist.all_reduce(sums)
        norms = sums[: len(terms)].sqrt() / loss_scale
        if half:
            self._adapt_loss_scale(norms.isfinite().all())
        # NaN where a gradient is 0
        return norms, sums[len(terms) :] / loss_scale**2 / (norms[0] * norms[1:]) if with_cosines else None

    def _adapt_loss_scale(self, finite: Tensor) -> None:
        """Halves the scale where float16 overflowed; doubles it after many measurements that did not."""
        tracker = torch.where(finite, self._growth_tracker.to(finite.device) + 1, 0)
        doubled = torch.where(tracker >= GROWTH_INTERVAL, 2 * self._loss_scale, self._loss_scale).clamp(max=INIT_SCALE)
        self._loss_scale = torch.where(finite, doubled, self._loss_scale / 2)
        self._growth_tracker = torch.where(tracker >= GROWTH_INTERVAL, 0, tracker)

    def _update(self, norms: Tensor, active: Tensor) -> None:
        known = self._norms.isfinite() & (self._norms > 0)  # an average from 0 on would be too low for long
        smoothed = torch.where(known, torch.lerp(norms, self._norms, MOMENTUM), norms)
        if self.limits:  # a method that jumps is above its limit at once
            smoothed[1:] = torch.maximum(smoothed[1:], norms[1:])
        self._norms = torch.where(norms.isfinite().all() & active, smoothed, self._norms)
        if not self._measured:  # float16 may overflow at first: try again in the next iteration
            self._measured = bool((self._norms.isfinite() | ~active).all())

    def _watch(self, cosines: Tensor, active: Tensor) -> None:
        """Lets the guard see the cosines, and logs them and its factors."""
        assert self.guard is not None and self._guard_state is not None
        before = self._guard_state.factors.to(cosines.device)
        self._guard_state = self.guard.updated(self._guard_state, cosines, active)
        smoothed, factors, changed = torch.stack(
            [self._guard_state.cosines, self._guard_state.factors, (self._guard_state.factors - before).sign()]
        ).tolist()
        storage = get_event_storage()
        for name, cosine, factor, change in zip(self.methods, smoothed, factors, changed):
            if math.isfinite(cosine):
                storage.put_scalar(f"gradient_cosine/{name}", cosine, smoothing_hint=False)
            storage.put_scalar(f"guard/{name}", factor, smoothing_hint=False)
            if change:
                logger.info(
                    "Guard: %s is %s to %.4g of its weight; the cosine of its gradient with the task's is %.2g.",
                    name,
                    "lowered" if change < 0 else "raised",
                    factor,
                    cosine,
                )

    def _log(self, norms: Tensor, scales: Tensor, factors: Tensor) -> None:
        pulls = norms * torch.cat([torch.ones_like(norms[:1]), scales]) * factors
        values = torch.cat([pulls / pulls.sum(), scales]).tolist()
        if not all(math.isfinite(value) for value in values):
            return  # float16 has overflowed, or nothing pulls at all
        names = [f"gradient_share/{name}" for name in (TASK, *self.methods)]
        if self.ratio is not None:
            names += [f"balance/{name}" for name in self.methods]
        storage = get_event_storage()
        for name, value in zip(names, values):
            storage.put_scalar(name, value, smoothing_hint=False)


def _filled(values: Sequence[float], device: torch.device) -> Tensor:
    """The values as a tensor that is filled on the device: one that is copied there makes the host wait."""
    return torch.stack([torch.full((), value, device=device) for value in values])


def _gradients(losses: Losses, features: Sequence[Tensor], loss_scale: Tensor) -> Sequence[Tensor | None]:
    """Gradients of the losses' sum, times `loss_scale`; None for a feature that they do not depend on."""
    connected = [loss for loss in losses.values() if loss.requires_grad]
    if not connected:
        return [None] * len(features)
    return torch.autograd.grad(sum(connected) * loss_scale, features, retain_graph=True, allow_unused=True)


def _squared_norm(gradients: Sequence[Tensor | None], features: Sequence[Tensor]) -> Tensor:
    """Squared norm, a scalar in float32."""
    zero = torch.zeros((), device=features[0].device)
    squares = [torch.linalg.vector_norm(g, dtype=torch.float32).square() for g in gradients if g is not None]
    return sum(squares, start=zero)


def _product(a: Sequence[Tensor | None], b: Sequence[Tensor | None], features: Sequence[Tensor]) -> Tensor:
    """Scalar product, in float32."""
    zero = torch.zeros((), device=features[0].device)
    both = [(x, y) for x, y in zip(a, b) if x is not None and y is not None]
    return sum([(x.float() * y.float()).sum() for x, y in both], start=zero)
