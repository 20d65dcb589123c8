"""Retry of a computation that ran out of GPU memory."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

__all__ = ["retry_if_cuda_oom"]

logger = logging.getLogger(__name__)


@contextmanager
def _record_cuda_oom(failures: list[str]) -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as e:
        failures.append(str(e))


def retry_if_cuda_oom(func: Callable) -> Callable:
    """Retries a function that runs out of GPU memory: with PyTorch's cache emptied, then with its arguments on
    the CPU.

    Args:
        func: a function without side effects. Arguments with a `device` and a method `to` are moved (tensors,
            `Boxes`, `BitMasks`, ...), those inside of other containers are not. Its results may
            be on the CPU.

    Returns:
        The function that retries.
    """

    @wraps(func)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        failures: list[str] = []
        with _record_cuda_oom(failures):
            return func(*args, **kwargs)
        torch.cuda.empty_cache()
        with _record_cuda_oom(failures):
            return func(*args, **kwargs)
        logger.info("%s ran out of GPU memory; it is repeated on the CPU.", getattr(func, "__name__", func))
        return func(*map(_to_cpu, args), **{name: _to_cpu(value) for name, value in kwargs.items()})

    return wrapped


def _to_cpu(value: Any) -> Any:
    device = getattr(value, "device", None)
    on_gpu = isinstance(device, torch.device) and device.type == "cuda" and hasattr(value, "to")
    return value.to(device=torch.device("cpu")) if on_gpu else value
