"""Numbers that losses are divided by, over all processes."""

import torch.distributed as dist
from torch import Tensor

from detectron2.utils import comm


def mean_over_processes(values: Tensor) -> Tensor:
    """Returns the mean of a tensor over all processes: their mean gradient is that of one process with all images."""
    if comm.get_world_size() > 1:
        dist.all_reduce(values)
        values /= comm.get_world_size()
    return values
