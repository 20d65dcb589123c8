"""Undoing a failed step."""

from collections.abc import Iterator
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
        self._statistics = [b for m in norms for b in m.buffers(recurse=False)]
        self._distillers = [m for m in model.modules() if isinstance(m, Distiller)]
        #: copies of what the present step may change, by the buffers' identity
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
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
        self._copies = self._room_for_copies()
        for live, copies in self._by_type():
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
        for live, copies in self._by_type():
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

    def _room_for_copies(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Each buffer that the next step may change, with a place for its copy; that of the last step is used again."""
        changing = self._statistics + [b for m in self._distillers for b in m.changing_buffers()]
        room = {}
        for live in changing:
            known = self._copies.get(id(live))
            fits = known is not None and known[0] is live and known[1].device == live.device
            room[id(live)] = known if known is not None and fits else (live, torch.empty_like(live))
        return room

    def _by_type(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """The buffers and their copies, type by type: lists of one type are copied in one go."""
        by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for live, copy in self._copies.values():
            lists = by_type.setdefault(live.dtype, ([], []))
            lists[0].append(live)
            lists[1].append(copy)
        yield from by_type.values()


def _has_position(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state
