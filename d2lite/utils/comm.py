"""Communication between training processes; every function also works without torch.distributed."""

import functools
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

_LOCAL_PROCESS_GROUP: dist.ProcessGroup | None = None


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if _is_distributed() else 1


def get_rank() -> int:
    """Returns the index of this process among all."""
    return dist.get_rank() if _is_distributed() else 0


def is_main_process() -> bool:
    """Returns whether this is the process of rank 0."""
    return get_rank() == 0


def create_local_process_group(num_workers_per_machine: int) -> None:
    """Creates the groups of processes that share a machine. All processes must call it.

    Args:
        num_workers_per_machine: processes per machine; it divides the world size.
    """
    global _LOCAL_PROCESS_GROUP
    processes = get_world_size()
    assert processes % num_workers_per_machine == 0, (
        f"{processes} processes cannot be spread over machines with {num_workers_per_machine} each"
    )
    for first in range(0, processes, num_workers_per_machine):
        ranks = list(range(first, first + num_workers_per_machine))
        group = dist.new_group(ranks)
        if get_rank() in ranks:
            _LOCAL_PROCESS_GROUP = group


def get_local_process_group() -> dist.ProcessGroup:
    """Returns the group of the processes on this machine, made by `create_local_process_group`."""
    assert _LOCAL_PROCESS_GROUP is not None, "No local process group: start the processes with launch()."
    return _LOCAL_PROCESS_GROUP


def get_local_rank() -> int:
    """Returns the index of this process among those on the same machine."""
    return dist.get_rank(group=get_local_process_group()) if _is_distributed() else 0


def get_local_size() -> int:
    """Returns the number of processes on this machine."""
    return dist.get_world_size(group=get_local_process_group()) if _is_distributed() else 1


def synchronize() -> None:
    """Waits until all processes get here."""
    if get_world_size() > 1:
        dist.barrier(device_ids=[torch.cuda.current_device()] if _uses_nccl() else None)


def _uses_nccl() -> bool:
    return dist.get_backend() == dist.Backend.NCCL


@functools.cache
def _cpu_group() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo")


def _object_group() -> dist.ProcessGroup:
    # NCCL would send pickled objects through GPU memory.
    return _cpu_group() if _uses_nccl() else dist.group.WORLD


def all_gather(data: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Collects an object from every process in every process.

    Args:
        data: any picklable object.
        group: the processes that take part; by default all, over the CPU.

    Returns:
        The objects, ordered by rank.
    """
    if get_world_size() == 1:
        return [data]
    group = _object_group() if group is None else group
    gathered = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, data, group=group)
    return gathered


def gather(data: Any, dst: int = 0, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Collects an object from every process in one.

    Args:
        data: any picklable object.
        dst: rank of the process that gets them.
        group: the processes that take part; by default all, over the CPU.

    Returns:
        On `dst` the objects, ordered by rank; elsewhere an empty list.
    """
    if get_world_size() == 1:
        return [data]
    group = _object_group() if group is None else group
    gathered = [None] * dist.get_world_size(group) if get_rank() == dst else None
    dist.gather_object(data, gathered, dst=dst, group=group)
    return gathered or []


def shared_random_seed() -> int:
    """Returns a random number below 2**31 that is the same in all processes. All must call it."""
    return all_gather(np.random.randint(2**31))[0]


@torch.no_grad()
def reduce_dict(input_dict: dict[str, torch.Tensor], average: bool = True) -> dict[str, torch.Tensor]:
    """Sums or averages scalar tensors over the processes.

    Args:
        input_dict: scalars, with the same names in all processes.
        average: divide by the number of processes.

    Returns:
        The results on rank 0; on the others the values are not defined.
    """
    processes = get_world_size()
    if processes == 1:
        return input_dict
    names = sorted(input_dict)
    values = torch.stack([input_dict[name] for name in names])
    dist.reduce(values, 0)
    if average and is_main_process():
        values /= processes
    return dict(zip(names, values))
