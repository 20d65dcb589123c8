"""Undoing a failed step."""

from typing import Any

import torch
from torch import Tensor, nn

from d2kd.distillers import Distiller
from d2kd.modeling import DistilledModel
from d2kd.modeling.architectures import architecture_of


class StepSnapshot:
    """Snapshot of everything a forward pass mutates, for rolling back a failed step.

    That is batch-norm statistics, running loss normalizers, the distillers' buffers and positions, what the teacher's
    passes have drawn, the measured gradient norms of the methods, and PyTorch's random states.
    """

    def __init__(self, model: nn.Module, detector: nn.Module) -> None:
        """
        Args:
            model: that the steps train, maybe wrapped for data parallelism.
            detector: the detector whose running loss normalizers change.
        """
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]
        self._distillers = [m for m in model.modules() if isinstance(m, Distiller)]
        changing = [b for m in norms for b in m.buffers(recurse=False)] + [
            b for m in self._distillers for b in m.buffers()
        ]
        by_type: dict[torch.dtype, list[Tensor]] = {}  # lists of one type are copied in one go
        for buffer in {id(b): b for b in changing}.values():
            by_type.setdefault(buffer.dtype, []).append(buffer)
        self._buffers = [(live, [b.clone() for b in live]) for live in by_type.values()]
        self._architecture = architecture_of(detector)
        self._loss_normalizers: dict[str, Any] = {}
        self._positions: list[Any] = []
        distilled = [m for m in model.modules() if isinstance(m, DistilledModel)]
        self._passes = [m.passes for m in distilled if m.passes.state_dict()]
        self._pass_states: list[dict[str, Any]] = []
        self._balances = [m.balance for m in distilled if m.balance is not None]
        self._balance_states: list[dict[str, Any]] = []
        self._cuda = next(model.parameters()).is_cuda
        self._random: list[Tensor] = []

    @torch.no_grad()
    def save(self) -> None:
        """Takes the snapshot."""
        for live, copies in self._buffers:
            torch._foreach_copy_(copies, live)
        self._loss_normalizers = self._architecture.loss_normalizers()
        self._positions = [m.get_extra_state() if _has_position(m) else None for m in self._distillers]
        self._pass_states = [passes.state_dict() for passes in self._passes]
        # shallow: a balance replaces its tensors and never writes into them
        self._balance_states = [dict(vars(balance)) for balance in self._balances]
        self._random = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if self._cuda else [])

    @torch.no_grad()
    def restore(self) -> None:
        """Rolls back to the snapshot."""
        for live, copies in self._buffers:
            torch._foreach_copy_(live, copies)
        self._architecture.load_loss_normalizers(self._loss_normalizers)
        for distiller, position in zip(self._distillers, self._positions):
            if position is not None:
                distiller.set_extra_state(position)
        for passes, state in zip(self._passes, self._pass_states):
            passes.load_state_dict(state)
        for balance, state in zip(self._balances, self._balance_states):
            vars(balance).update(state)
        torch.set_rng_state(self._random[0])
        if self._cuda:
            torch.cuda.set_rng_state(self._random[1])


def _has_position(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state
