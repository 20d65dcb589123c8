"""Trainers that run one iteration at a time, in full and in mixed precision."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from d2lite.engine.loss_transfer import PendingLosses, average_over_processes, losses_to_floats
from d2lite.engine.trainer_base import HookBase, TrainerBase
from d2lite.utils import comm
from d2lite.utils.events import get_event_storage

__all__ = ["AMPTrainer", "HookBase", "SimpleTrainer", "TrainerBase"]


class SimpleTrainer(TrainerBase):
    """One data loader, one model that returns a dict of losses, one optimizer, one step per iteration."""

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        gather_metric_period: int = 1,
        zero_grad_before_forward: bool = False,
        async_write_metrics: bool = False,
    ) -> None:
        """
        Args:
            model: takes a batch, returns a dict of scalar losses or one scalar loss; set to training mode.
            data_loader: yields batches without end.
            optimizer: makes the step.
            gather_metric_period: collect the processes' losses, and check them, every so many iterations.
            zero_grad_before_forward: clear the gradients before the forward pass, which needs less memory,
                rather than after it.
            async_write_metrics: write the losses one iteration later, so that the CPU never waits for a GPU.
                Losses that are not finite then end the training one iteration, and one update, later.
        """
        super().__init__()
        model.train()
        self.model = model
        self.data_loader = data_loader
        self.optimizer = optimizer
        self.gather_metric_period = gather_metric_period
        self.zero_grad_before_forward = zero_grad_before_forward
        self.async_write_metrics = async_write_metrics
        self._batches: Iterator[Any] | None = None
        self._pending_metrics: PendingLosses | None = None

    def run_step(self) -> None:
        """Runs forward pass, backward pass and optimizer step on the next batch."""
        batch, data_time = self._next_batch()
        clear, early = self.optimizer.zero_grad, self.zero_grad_before_forward
        if early:
            clear()
        loss_dict, total = self._forward(batch)
        if not early:
            clear()
        self._backpropagate(total)
        self.after_backward()
        self._submit_metrics(loss_dict, data_time)
        self._step_optimizer()

    def _backpropagate(self, loss: torch.Tensor) -> None:
        loss.backward()

    def _step_optimizer(self) -> None:
        self.optimizer.step()

    def _next_batch(self) -> tuple[Any, float]:
        """Returns a batch and the seconds that it took."""
        if not self.model.training:
            raise RuntimeError(
                f"{type(self).__name__}: the model is in eval mode; call model.train() after evaluating it."
            )
        began = time.perf_counter()
        batch = next(self._data_loader_iter)
        return batch, time.perf_counter() - began

    def _forward(self, batch: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        losses = self.model(batch)
        named = {"total_loss": losses} if isinstance(losses, torch.Tensor) else losses
        return named, sum(named.values())

    @property
    def _data_loader_iter(self) -> Iterator[Any]:
        # Created on first use: worker processes start only if there is a training.
        self._batches = iter(self.data_loader) if self._batches is None else self._batches
        return self._batches

    def reset_data_loader(self, data_loader_builder: Callable[[], Iterable[Any]]) -> None:
        """Replaces the data loader; the old one is released before the new one is built.

        Args:
            data_loader_builder: makes the new one.
        """
        self._batches = None
        del self.data_loader
        self.data_loader = data_loader_builder()

    def after_train(self) -> None:
        """Writes what is left to write if the training is complete, then calls the hooks' `after_train`."""
        try:
            # After a failure the other processes may not get here, and writing would wait for them.
            if self.iter >= self.max_iter:
                self.flush_metrics()
        finally:
            super().after_train()

    def _submit_metrics(self, loss_dict: Mapping[str, torch.Tensor], data_time: float) -> None:
        self.flush_metrics()
        if self.async_write_metrics and all(loss.is_cuda for loss in loss_dict.values()):
            self._pending_metrics = PendingLosses(loss_dict, data_time, self.iter)
        else:
            self._write_metrics(loss_dict, data_time)

    def flush_metrics(self) -> None:
        """Writes the metrics that `async_write_metrics` held back. All processes must call this together."""
        pending, self._pending_metrics = self._pending_metrics, None
        if pending is not None:
            self._write_metrics(pending.wait(), pending.data_time, iter=pending.iteration)

    def _write_metrics(
        self,
        loss_dict: Mapping[str, torch.Tensor],
        data_time: float,
        prefix: str = "",
        iter: int | None = None,
    ) -> None:
        """Writes the losses of an iteration, if it is the turn of one in `gather_metric_period`.

        Args:
            loss_dict: scalar losses.
            data_time: seconds that the batch took.
            prefix: of the total's name.
            iter: the iteration they belong to; None is the present one.
        """
        iteration = self.iter if iter is None else iter
        if (iteration + 1) % self.gather_metric_period == 0:
            self.write_metrics(loss_dict, data_time, iteration, prefix)

    @staticmethod
    def write_metrics(loss_dict: Mapping[str, torch.Tensor], data_time: float, cur_iter: int, prefix: str = "") -> None:
        """Puts the losses, their sum `total_loss` and `data_time` into the event storage of the main process.

        Losses are averaged over the processes; of the data times the maximum is taken.

        Args:
            loss_dict: scalar losses, the same names in all processes.
            data_time: seconds that the batch took.
            cur_iter: the iteration they belong to.
            prefix: of the total's name.

        Raises:
            FloatingPointError: in every process, if a loss is NaN or infinite in any; names the losses.
        """
        metrics = average_over_processes({**losses_to_floats(loss_dict), "data_time": data_time})
        data_time = metrics.pop("data_time")
        total = sum(metrics.values())
        if not np.isfinite(total):
            not_finite = [name for name, value in metrics.items() if not np.isfinite(value)]
            raise FloatingPointError(
                f"The loss became infinite or NaN in iteration {cur_iter}.\n"
                f"Not finite: {', '.join(not_finite) or 'the sum'}\nloss_dict = {metrics}"
            )
        if comm.is_main_process():
            single = metrics if len(metrics) > 1 else {}
            scalars = {"data_time": data_time, f"{prefix}total_loss": total, **single}
            get_event_storage().put_scalars(cur_iter=cur_iter, **scalars)

    def state_dict(self) -> dict[str, Any]:
        """Returns the base class's state and the optimizer's."""
        return {**super().state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict["optimizer"])


class AMPTrainer(SimpleTrainer):
    """Like `SimpleTrainer`, with a forward pass in mixed precision and, for float16, scaled losses."""

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        gather_metric_period: int = 1,
        zero_grad_before_forward: bool = False,
        grad_scaler: torch.amp.GradScaler | None = None,
        precision: torch.dtype = torch.float16,
        log_grad_scaler: bool = False,
        async_write_metrics: bool = False,
    ) -> None:
        """
        Args:
            model: as in `SimpleTrainer`, and so are the arguments not listed here.
            grad_scaler: scales the loss; None makes one that is active for float16 only.
            precision: torch.float16 or torch.bfloat16; the latter needs no scaling.
            log_grad_scaler: record the scale as `[metric]grad_scaler`.

        Raises:
            ValueError: if one process drives several GPUs.
        """
        is_parallel = isinstance(model, DistributedDataParallel) and len(model.device_ids or ()) > 1
        if is_parallel or isinstance(model, DataParallel):
            raise ValueError("AMPTrainer needs one process per GPU; start the program with --num-gpus.")
        super().__init__(
            model, data_loader, optimizer, gather_metric_period, zero_grad_before_forward, async_write_metrics
        )
        self.device_type = next(model.parameters()).device.type
        if grad_scaler is None:
            grad_scaler = torch.amp.GradScaler(self.device_type, enabled=precision == torch.float16)
        self.grad_scaler = grad_scaler
        self.precision = precision
        self.log_grad_scaler = log_grad_scaler

    def _forward(self, batch: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        with torch.autocast(self.device_type, dtype=self.precision):
            return super()._forward(batch)

    def _backpropagate(self, loss: torch.Tensor) -> None:
        super()._backpropagate(self.grad_scaler.scale(loss))
        if self.log_grad_scaler:
            get_event_storage().put_scalar("[metric]grad_scaler", self.grad_scaler.get_scale())

    def _step_optimizer(self) -> None:
        scaler = self.grad_scaler
        scaler.step(self.optimizer)
        scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """Returns the base class's state and, where the loss is scaled, the scaler's."""
        state = super().state_dict()
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned, also that of another precision."""
        scaler = self.grad_scaler
        super().load_state_dict(state_dict)
        if scaler.is_enabled() and "grad_scaler" in state_dict:
            scaler.load_state_dict(state_dict["grad_scaler"])
