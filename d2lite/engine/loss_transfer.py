"""Transfer of losses from the GPU and from other processes to the process that records them."""

from collections.abc import Mapping

import numpy as np
import torch

from d2lite.utils import comm


class PendingLosses:
    """Losses in an asynchronous copy from the GPU, which waits for their computation but not for later work."""

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
    """Copies scalars to the CPU with one synchronization instead of one per loss."""
    return dict(zip(losses, _stack(losses).tolist())) if losses else {}


def average_over_processes(metrics: dict[str, float]) -> dict[str, float]:
    """Averages over the processes, which all must call this; the maximum is taken of the entry "data_time"."""
    if comm.get_world_size() == 1:
        return metrics
    gathered = comm.all_gather(metrics)
    average = {name: float(np.mean([each[name] for each in gathered])) for name in gathered[0]}
    average["data_time"] = max(each["data_time"] for each in gathered)
    return average
