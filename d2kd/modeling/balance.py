"""How strongly each method pulls at the student: its gradient on the shared taps, measured, logged and balanced."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from d2kd.errors import UserError
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

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
        self, methods: Sequence[str], *, ratio: float | None = None, period: int = 10, log_period: int = 0
    ) -> None:
        """
        Args:
            methods: names of the methods.
            ratio: gradient norm of each method over the task's, above 0; None leaves the losses as they are.
            period: iterations between measurements, where there is a ratio.
            log_period: iterations between logs of the shares; 0 = never.
        """
        self.methods = list(methods)
        self.ratio = ratio
        self.period = period
        self.log_period = log_period
        # smoothed norms of the task and of each method before scaling
        self._norms = torch.full((1 + len(self.methods),), float("nan"))
        self._measured = False
        self._loss_scale = torch.tensor(INIT_SCALE)
        # measurements in a row without overflow
        self._growth_tracker = torch.tensor(0)

    @classmethod
    def from_config(cls, cfg: CfgNode, methods: Sequence[str]) -> Optional["GradientBalance"]:
        """What `DISTILL.BALANCE` and `DISTILL.LOG_GRADIENT_SHARE` ask for; None if that is nothing."""
        node = cfg.DISTILL
        ratio = node.BALANCE_RATIO if node.BALANCE == "gradient" else None
        if not methods or (ratio is None and node.LOG_GRADIENT_SHARE == 0):
            return None
        return cls(methods, ratio=ratio, period=node.BALANCE_PERIOD, log_period=node.LOG_GRADIENT_SHARE)

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
        iteration = get_event_storage().iter
        log = self.log_period > 0 and iteration % self.log_period == 0
        update = self.ratio is not None and (iteration % self.period == 0 or not self._measured)
        norms = self.measure([task, *(methods[name] for name in self.methods)], features) if log or update else None
        given = [1.0, *((factors or {}).get(name, 1.0) for name in self.methods)]
        if norms is not None and update:
            self._update(norms, torch.tensor([factor > 0 for factor in given], device=norms.device))
        scales = self.scales()
        if norms is not None and log:
            self._log(norms, scales, norms.new_tensor(given))
        if self.ratio is None:
            return {name: dict(losses) for name, losses in methods.items()}
        return {
            name: {key: loss * scale for key, loss in methods[name].items()}
            for name, scale in zip(self.methods, scales)
        }

    def scales(self) -> Tensor:
        """Factor on each method's losses, (M,); 1 without a ratio, and where a method or the task has no gradient."""
        ones = torch.ones_like(self._norms[1:])
        if self.ratio is None:
            return ones
        scales = self.ratio * self._norms[0] / self._norms[1:]
        return torch.where(torch.isfinite(scales) & (scales > 0), scales, ones)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "methods": self.methods,
            "norms": self._norms.tolist(),
            "loss_scale": self._loss_scale.item(),
            "steady": self._growth_tracker.item(),
        }

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

    def measure(self, terms: Sequence[Losses], features: Sequence[Tensor]) -> Tensor:
        """Returns gradient norms of the terms, (len(terms),), of all processes; not finite where float16 overflows."""
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
            squares = torch.stack([_squared_norm(losses, features, loss_scale) for losses in terms])
        if comm.get_world_size() > 1:
            dist.all_reduce(squares)
        norms = squares.sqrt() / loss_scale
        if half:
            self._adapt_loss_scale(norms.isfinite().all())
        return norms

    def _adapt_loss_scale(self, finite: Tensor) -> None:
        """Halves the scale where float16 overflowed; doubles it after many measurements that did not."""
        tracker = torch.where(finite, self._growth_tracker.to(finite.device) + 1, 0)
        doubled = torch.where(tracker >= GROWTH_INTERVAL, 2 * self._loss_scale, self._loss_scale).clamp(max=INIT_SCALE)
        self._loss_scale = torch.where(finite, doubled, self._loss_scale / 2)
        self._growth_tracker = torch.where(tracker >= GROWTH_INTERVAL, 0, tracker)

    def _update(self, norms: Tensor, active: Tensor) -> None:
        smoothed = torch.where(self._norms.isnan(), norms, torch.lerp(norms, self._norms, MOMENTUM))
        self._norms = torch.where(norms.isfinite().all() & active, smoothed, self._norms)
        if not self._measured:  # float16 may overflow at first: try again in the next iteration
            self._measured = bool((self._norms.isfinite() | ~active).all())

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


def _squared_norm(losses: Losses, features: Sequence[Tensor], loss_scale: Tensor) -> Tensor:
    """Squared norm of the gradient of the losses' sum, times `loss_scale` squared; a scalar in float32."""
    connected = [loss for loss in losses.values() if loss.requires_grad]
    zero = torch.zeros((), device=features[0].device)
    if not connected:
        return zero
    gradients = torch.autograd.grad(sum(connected) * loss_scale, features, retain_graph=True, allow_unused=True)
    squares = [torch.linalg.vector_norm(g, dtype=torch.float32).square() for g in gradients if g is not None]
    return sum(squares, start=zero)
