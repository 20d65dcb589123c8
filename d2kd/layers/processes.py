"""Numbers that losses are divided by, over all processes."""

import torch.distributed as dist
from torch import Tensor


def mean_over_processes(values: Tensor) -> Tensor:
    """Returns the mean of a tensor over all processes: their mean gradient is that of one process with all images.

    Args:
        values: without a gradient; all processes must come here, with the same shape.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
