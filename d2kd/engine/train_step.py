"""One optimizer step: accumulation, mixed precision, and a guard against losses that are not finite."""

import contextlib
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from d2kd.config import ConfigError
from d2kd.distillers import Distiller
from d2kd.modeling import DistilledModel
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from .checkpoint import RUNNING_ATTRIBUTES

#: Iterations between looks at float16's loss scale, and the scale at which a run has failed; `GradScaler` starts with
#: the other one, and skips every step that overflows.
_SCALE_PERIOD, _LEAST_SCALE, _FIRST_SCALE = 20, 2.0**-14, 2.0**16


class NonFiniteLossError(FloatingPointError):
    """A loss or gradient became infinite or NaN; the message says where the state before it is."""


class TrainStep(SimpleTrainer):
    """Runs steps over a loader: forward, backward, check, update."""

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict[str, Any]]],
        optimizer: Optimizer,
        *,
        precision: torch.dtype | None = None,
        accumulate: int = 1,
        before_raising: Callable[[], str] = lambda: "",
        running_model: nn.Module | None = None,
    ) -> None:
        """
        Args:
            model: returns a dict of scalar losses; may be wrapped for data parallelism.
            data_loader: endless batches.
            optimizer: over the model's parameters.
            precision: torch.float16 (with loss scaling) or torch.bfloat16 for mixed precision, None for float32.
            accumulate: batches a step; their gradients are averaged.
            before_raising: called when a loss is not finite, before anything is updated; saves what is worth saving and
                returns where to.
            running_model: whose running loss normalisers a failed step must not change, if not the model's.
        """
        super().__init__(model, data_loader, optimizer)
        if accumulate < 1:
            raise ConfigError(f"SOLVER.ACCUMULATE is {accumulate}; it must be at least 1.")
        self.precision = precision
        self.accumulate = accumulate
        self.before_raising = before_raising
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)
        self._before = StateBeforeStep(model, running_model or model)
        #: set by a process that is asked to stop
        self.stop_requested = False
        #: whether one of the processes was, as all of them know since the last step
        self.stop_agreed = False

    def run_step(self) -> None:
        """Trains on `accumulate` batches.

        Raises:
            NonFiniteLossError: on every process, before weights or statistics have changed. Where the model itself
                raises FloatingPointError (Detectron2's proposals), on that process.
        """
        assert self.model.training, "The model was left in evaluation mode."
        self._before.remember()
        self._check_scale()
        self.optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        waited = 0.0
        for number in range(self.accumulate):
            start = time.perf_counter()
            data = next(self._data_loader_iter)
            waited += time.perf_counter() - start
            with self._synchronise_if(number == self.accumulate - 1):
                for name, loss in self._backward(data).items():
                    sums[name] = sums[name] + loss if name in sums else loss
        self._record({name: loss / self.accumulate for name, loss in sums.items()}, waited)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _backward(self, data: list[dict[str, Any]]) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision is not None):
            try:
                losses = self.model(data)
            except FloatingPointError as error:
                self._fail(str(error).rstrip("."), together=False)
        total = sum(losses.values()) / self.accumulate if self.accumulate > 1 else sum(losses.values())
        self.scaler.scale(total).backward()
        return {name: loss.detach().float() for name, loss in losses.items()}

    def _synchronise_if(self, last: bool) -> AbstractContextManager:
        if last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _record(self, losses: dict[str, Tensor], data_time: float) -> None:
        """Averages over processes, checks, and logs; one transfer from the device for all losses."""
        names = sorted(losses)
        others = torch.tensor([data_time, float(self.stop_requested)], device=self.device)
        norm = {} if self.scaler.is_enabled() else {"grad_norm": self._gradient_norm()}
        values = torch.cat([torch.stack([*(losses[name] for name in names), *norm.values()]), others])
        if comm.get_world_size() > 1:
            dist.all_reduce(values)
            values /= comm.get_world_size()
        *numbers, data_time, stop = values.tolist()
        self.stop_agreed = stop > 0
        norm = dict(zip(norm, numbers[len(names) :]))
        numbers = dict(zip(names, numbers))
        bad = [f"{name} = {value}" for name, value in [*numbers.items(), *norm.items()] if not np.isfinite(value)]
        if bad:
            self._fail(", ".join(bad))
        if comm.is_main_process():
            storage = get_event_storage()
            storage.put_scalar("data_time", data_time)
            storage.put_scalar("total_loss", sum(numbers.values()))
            if norm:
                storage.put_scalars(**norm)
            distilled = [value for name, value in numbers.items() if name.startswith("distill/")]
            # the console shows names with "loss" in them: one for all levels there, each of them in metrics.json
            if distilled:
                storage.put_scalar("distill_loss", sum(distilled))
            if len(numbers) > 1:
                storage.put_scalars(**numbers)

    @torch.no_grad()
    def _gradient_norm(self) -> Tensor:
        """Norm of the whole gradient before clipping, a scalar, the same on every process."""
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return torch.zeros((), device=self.device)
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))).float()

    def _check_scale(self) -> None:
        if not self.scaler.is_enabled() or self.iter % _SCALE_PERIOD:
            return
        scale = self.scaler.get_scale()
        if comm.is_main_process():
            get_event_storage().put_scalar("grad_scale", scale, smoothing_hint=False)
        if scale < _LEAST_SCALE:
            # the run that continues from here starts as a new one
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": _FIRST_SCALE})
            self._fail(f"gradients overflow float16, with the loss scaled by no more than {scale:g}")

    def _fail(self, what: str, together: bool = True) -> NoReturn:
        self._before.restore()
        if together or comm.get_world_size() == 1:
            kept = self.before_raising()
        else:  # the other processes wait for this one's gradients and cannot take part in saving
            kept = " --resume continues from the last checkpoint."
        raise NonFiniteLossError(
            f"Not finite at iteration {self.iter}: {what}. Try a lower SOLVER.BASE_LR, a longer "
            f"SOLVER.WARMUP_ITERS, gradient clipping (SOLVER.CLIP_GRADIENTS) or a smaller weight of that method.{kept}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Iteration, optimizer and loss scale."""
        state = super().state_dict()
        if self.scaler.is_enabled():
            state["grad_scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state_dict)
        if self.scaler.is_enabled() and "grad_scaler" in state_dict:
            self.scaler.load_state_dict(state_dict["grad_scaler"])


class StateBeforeStep:
    """Copies of all that a forward pass changes, so that a failed one can be undone.

    These are batch-norm statistics, running loss normalisers, the distillers' buffers and positions, the measured
    gradient norms of the methods, and PyTorch's random states.
    """

    def __init__(self, model: nn.Module, running_model: nn.Module) -> None:
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]
        self._distillers = [m for m in model.modules() if isinstance(m, Distiller)]
        changing = [b for m in norms for b in m.buffers(recurse=False)] + [
            b for m in self._distillers for b in m.buffers()
        ]
        by_type: dict[torch.dtype, list[Tensor]] = {}  # lists of one type are copied in one go
        for buffer in {id(b): b for b in changing}.values():
            by_type.setdefault(buffer.dtype, []).append(buffer)
        self._buffers = [(live, [b.clone() for b in live]) for live in by_type.values()]
        # Detectron2's dense detectors; the attribute itself may appear with the first batch only
        self._normalizing = [m for m in running_model.modules() if hasattr(m, "_ema_update")]
        self._normalizers: list[dict[str, Any]] = []
        self._positions: list[Any] = []
        self._balances = [m.balance for m in model.modules() if isinstance(m, DistilledModel) and m.balance is not None]
        self._balance_states: list[dict[str, Any]] = []
        self._cuda = next(model.parameters()).is_cuda
        self._random: list[Tensor] = []

    @torch.no_grad()
    def remember(self) -> None:
        """Copies the state of now."""
        for live, copies in self._buffers:
            torch._foreach_copy_(copies, live)
        self._normalizers = [{a: vars(m)[a] for a in RUNNING_ATTRIBUTES if a in vars(m)} for m in self._normalizing]
        self._positions = [m.get_extra_state() if _has_position(m) else None for m in self._distillers]
        # shallow: a balance replaces its tensors and never writes into them
        self._balance_states = [dict(vars(balance)) for balance in self._balances]
        self._random = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if self._cuda else [])

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the remembered state back."""
        for live, copies in self._buffers:
            torch._foreach_copy_(live, copies)
        for module, normalizers in zip(self._normalizing, self._normalizers):
            vars(module).update(normalizers)
        for distiller, position in zip(self._distillers, self._positions):
            if position is not None:
                distiller.set_extra_state(position)
        for balance, state in zip(self._balances, self._balance_states):
            vars(balance).update(state)
        torch.set_rng_state(self._random[0])
        if self._cuda:
            torch.cuda.set_rng_state(self._random[1])


def _has_position(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state
