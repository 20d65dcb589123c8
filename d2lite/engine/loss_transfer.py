"""Brings losses from the GPU and from other processes to where they are recorded."""

from collections.abc import Mapping

import numpy as np
import torch

from d2lite.utils import comm


class LossesInTransit:
    """Losses on their way from the GPU, copied behind the work that computes them and nothing later."""

    def __init__(self, losses: Mapping[str, torch.Tensor], data_time: float, iteration: int) -> None:
        """
        Args:
            losses: scalars on a GPU.
            data_time: seconds that the batch took.
            iteration: the iteration they belong to.
        """
        self.data_time, self.iteration = data_time, iteration
        self._names = list(losses)
        self._values = _stack(losses).to("cpu", non_blocking=True)
        self._arrived = torch.cuda.current_stream().record_event()

    def wait(self) -> dict[str, torch.Tensor]:
        """Returns the losses, on the CPU."""
        self._arrived.synchronize()
        return dict(zip(self._names, self._values))


def _stack(losses: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([loss.detach().reshape(()).float() for loss in losses.values()])


def losses_to_floats(losses: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Fetches scalars with one wait for the GPU instead of one per loss."""
    return dict(zip(losses, _stack(losses).tolist())) if losses else {}


def average_over_processes(metrics: dict[str, float]) -> dict[str, float]:
    """Averages over the processes, which all must call this; the entry "data_time" becomes the largest."""
    if comm.get_world_size() == 1:
        return metrics
    gathered = comm.all_gather(metrics)
    average = {name: float(np.mean([each[name] for each in gathered])) for name in gathered[0]}
    average["data_time"] = max(each["data_time"] for each in gathered)
    return average
