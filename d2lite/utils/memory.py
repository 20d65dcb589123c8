"""Retry of a computation that ran out of GPU memory."""

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial, wraps
from typing import Any

import torch

logger = logging.getLogger(__name__)


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
        call = partial(func, *args, **kwargs)
        for _ in range(2):
            with suppress(torch.cuda.OutOfMemoryError):
                return call()
            torch.cuda.empty_cache()
        logger.info("%s ran out of GPU memory; it is repeated on the CPU.", getattr(func, "__name__", func))
        return func(*map(_to_cpu, args), **{name: _to_cpu(value) for name, value in kwargs.items()})

    return wrapped


def _to_cpu(value: Any) -> Any:
    device = getattr(value, "device", None)
    on_gpu = isinstance(device, torch.device) and device.type == "cuda" and hasattr(value, "to")
    return value.to(device=torch.device("cpu")) if on_gpu else value
