"""Starts a function in one process per GPU, or in several CPU processes."""

import gc
import logging
import os
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from d2lite.utils import comm

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = timedelta(minutes=30)


def launch(
    main_func: Callable[..., Any],
    num_gpus_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = None,
    args: Sequence[Any] = (),
    timeout: timedelta = DEFAULT_TIMEOUT,
) -> Any:
    """Runs `main_func(*args)` in every process of a distributed job; call this once on each machine.

    With CUDA, each process gets a GPU and they communicate through NCCL; without, they run on the CPU and use gloo.

    Args:
        main_func: must be importable by name where processes are started.
        num_gpus_per_machine: number of processes per machine.
        num_machines: number of machines.
        machine_rank: which of them this is, from 0.
        dist_url: the rendezvous address, such as "tcp://host:port"; None and "auto" pick a free port
            (one machine only).
        args: of `main_func`.
        timeout: of collective operations.

    Returns:
        What `main_func` returns if this process runs it, None if it started others.

    Raises:
        ValueError: if the arguments do not fit each other or the machine.
    """
    processes = num_gpus_per_machine * num_machines
    if processes <= 1:
        return main_func(*args)
    if torch.cuda.is_available() and num_gpus_per_machine > torch.cuda.device_count():
        raise ValueError(
            f"{num_gpus_per_machine} GPUs per machine were requested, but this one has "
            f"{torch.cuda.device_count()}. Set --num-gpus or CUDA_VISIBLE_DEVICES."
        )
    url = _rendezvous_url(dist_url, num_machines)
    job = (main_func, processes, num_gpus_per_machine, machine_rank, url, tuple(args), timeout)
    mp.start_processes(_run_worker, job, num_gpus_per_machine, start_method="spawn")
    return None


def _destroy_process_group() -> None:
    """Destroys the process group once all processes have reached this point."""
    comm.synchronize()
    # Trainers and their hooks refer to each other: without this, data-parallel models would outlive the group that
    # they communicate through, and sometimes abort the process.
    gc.collect()
    dist.destroy_process_group()


def _rendezvous_url(dist_url: str | None, num_machines: int) -> str:
    if dist_url in (None, "auto"):
        if num_machines > 1:
            raise ValueError("With several machines, --dist-url must name the first one: tcp://host:port.")
        return f"tcp://127.0.0.1:{_free_port()}"
    if dist_url.startswith("file:") and num_machines > 1:
        logger.warning("file:// is not reliable with several machines; prefer --dist-url tcp://host:port.")
    return dist_url


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _take_gpu(local_rank: int) -> str:
    """Makes a GPU, where there are any, this process's; returns the backend that the processes talk through."""
    if not torch.cuda.is_available():
        return "gloo"
    torch.cuda.set_device(local_rank)
    return "nccl"


def _run_worker(
    local_rank: int,
    main_func: Callable[..., Any],
    world_size: int,
    num_gpus_per_machine: int,
    machine_rank: int,
    dist_url: str,
    args: tuple[Any, ...],
    timeout: timedelta,
) -> None:
    """Body of each started process."""
    backend = _take_gpu(local_rank)
    if backend == "gloo" and "OMP_NUM_THREADS" not in os.environ:
        # Each process would otherwise use all cores, and they would slow each other down.
        torch.set_num_threads(max(1, torch.get_num_threads() // num_gpus_per_machine))
    rank = machine_rank * num_gpus_per_machine + local_rank
    try:
        dist.init_process_group(backend, init_method=dist_url, world_size=world_size, rank=rank, timeout=timeout)
    except Exception:
        logger.error("Process %d of %d could not join the process group at %s.", rank, world_size, dist_url)
        raise
    comm.create_local_process_group(num_gpus_per_machine)
    # Otherwise a process that fails or is slow to start would cause a timeout in a later collective operation.
    comm.synchronize()
    main_func(*args)
    _destroy_process_group()
