"""One optimizer step: accumulation, mixed precision, and a guard against losses that are not finite."""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from d2kd.errors import ConfigError, UserError, require_choice
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from .rollback import StepSnapshot

#: Iterations between checks of float16's loss scale, and the scale at which a run has failed; `GradScaler` starts with
#: INIT_SCALE, and skips every step that overflows.
SCALE_CHECK_PERIOD, MIN_LOSS_SCALE, INIT_SCALE = 20, 2.0**-14, 2.0**16

_HALF_PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


#: What may keep a loss finite.
ADVICE = (
    "Try a lower SOLVER.BASE_LR, a longer SOLVER.WARMUP_ITERS, gradient clipping (SOLVER.CLIP_GRADIENTS) or a smaller "
    "weight of that method."
)


class NonFiniteLossError(UserError, FloatingPointError):
    """A loss or gradient became infinite or NaN; the message says where the state before it is."""


class TrainingError(UserError):
    """A step that cannot be made with these images."""


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
        detector: nn.Module | None = None,
    ) -> None:
        """
        Args:
            model: returns a dict of scalar losses; may be wrapped for data parallelism.
            data_loader: endless batches.
            optimizer: over the model's parameters.
            precision: torch.float16 (with loss scaling) or torch.bfloat16 for mixed precision, None for float32.
            accumulate: batches per step; their gradients are averaged.
            before_raising: called when a loss is not finite, before anything is updated; saves what is worth saving and
                returns where to.
            detector: whose running loss normalizers a failed step must not change, if not the model's.
        """
        super().__init__(model, data_loader, optimizer)
        if accumulate < 1:
            raise ConfigError(f"SOLVER.ACCUMULATE is {accumulate}; it must be at least 1.")
        self.precision = precision
        self.accumulate = accumulate
        self.before_raising = before_raising
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)
        self._snapshot = StepSnapshot(model, detector or model)
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
        self._snapshot.save()
        self._check_scale()
        self.optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        waited = 0.0
        for number in range(self.accumulate):
            start = time.perf_counter()
            data = next(self._data_loader_iter)
            waited += time.perf_counter() - start
            with self._synchronize_if(number == self.accumulate - 1):
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
            except ValueError as error:
                _explain_batch_norm(self.model, error)
                raise
        total = sum(losses.values()) / self.accumulate if self.accumulate > 1 else sum(losses.values())
        self.scaler.scale(total).backward()
        return {name: loss.detach().float() for name, loss in losses.items()}

    def _synchronize_if(self, last: bool) -> AbstractContextManager[None]:
        if last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _record(self, losses: dict[str, Tensor], data_time: float) -> None:
        """Averages over processes, checks, and logs; one transfer from the device for all losses."""
        names = sorted(losses)
        # filled on the device: a tensor copied there would make the host wait before the norm is on its way
        others = [torch.full((), x, device=self.device) for x in (data_time, float(self.stop_requested))]
        norm = {} if self.scaler.is_enabled() else {"grad_norm": self._gradient_norm()}
        values = torch.stack([*(losses[name] for name in names), *norm.values(), *others])
        if comm.get_world_size() > 1:
            dist.all_reduce(values)
            values /= comm.get_world_size()
        *averages, data_time, stop = values.tolist()
        self.stop_agreed = stop > 0
        numbers = dict(zip(names, averages))
        norms = dict(zip(norm, averages[len(names) :]))
        bad = [f"{name} = {value}" for name, value in [*numbers.items(), *norms.items()] if not np.isfinite(value)]
        if bad:
            self._fail(", ".join(bad))
        if comm.is_main_process():
            storage = get_event_storage()
            storage.put_scalar("data_time", data_time)
            storage.put_scalar("total_loss", sum(numbers.values()))
            if norms:
                storage.put_scalars(**norms)
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
        if not self.scaler.is_enabled() or self.iter % SCALE_CHECK_PERIOD:
            return
        scale = self.scaler.get_scale()
        if comm.is_main_process():
            get_event_storage().put_scalar("grad_scale", scale, smoothing_hint=False)
        if scale < MIN_LOSS_SCALE:
            # the run that continues from here starts as a new one
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": INIT_SCALE})
            self._fail(f"gradients overflow float16, with the loss scaled by no more than {scale:g}")

    def _fail(self, what: str, together: bool = True) -> NoReturn:
        self._snapshot.restore()
        if together or comm.get_world_size() == 1:
            kept = self.before_raising()
        else:  # the other processes wait for this one's gradients and cannot take part in saving
            kept = " --resume (in Python resume=True) continues from the last checkpoint."
        raise NonFiniteLossError(f"Not finite at iteration {self.iter}: {what}. {ADVICE}{kept}")

    def state_dict(self) -> dict[str, Any]:
        """Iteration, optimizer and loss scale."""
        state = super().state_dict()
        if self.scaler.is_enabled():
            state["grad_scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state_dict)
        if self.scaler.is_enabled() and "grad_scaler" in state_dict:
            self.scaler.load_state_dict(state_dict["grad_scaler"])


def _explain_batch_norm(model: nn.Module, error: ValueError) -> None:
    """
    Raises:
        TrainingError: the error is that of a batch norm that sees one value a channel.
    """
    if isinstance(error, UserError) or "more than 1 value per channel" not in str(error):
        return
    names = {id(module): name for name, module in model.named_modules()}
    name, trace = "a batch norm", error.__traceback__
    while trace is not None:
        name = names.get(id(trace.tb_frame.f_locals.get("self")), name)  # the innermost module
        trace = trace.tb_next
    raise TrainingError(
        f"{name.removeprefix('module.')} sees one value a channel, and batch norm needs more in training. Take "
        "larger images (INPUT.MIN_SIZE_TRAIN) or more of them (SOLVER.IMS_PER_BATCH), or a norm without statistics of "
        "the batch (MODEL.RESNETS.NORM, MODEL.FPN.NORM, MODEL.SEM_SEG_HEAD.NORM: FrozenBN, GN)."
    ) from error


def mixed_precision(cfg: CfgNode) -> torch.dtype | None:
    """Returns the type of `SOLVER.AMP`, None for float32.

    Raises:
        ConfigError: unknown, or float16 on a CPU.
    """
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    name = cfg.SOLVER.AMP.PRECISION
    require_choice("SOLVER.AMP.PRECISION", name, _HALF_PRECISIONS)
    if name == "float16" and not cfg.MODEL.DEVICE.startswith("cuda"):
        raise ConfigError(
            f"SOLVER.AMP.PRECISION float16 needs CUDA, and MODEL.DEVICE is {cfg.MODEL.DEVICE!r}: set it to bfloat16."
        )
    return _HALF_PRECISIONS[name]
