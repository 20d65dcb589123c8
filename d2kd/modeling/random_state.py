"""Random states, left as they were."""

from contextlib import AbstractContextManager

import torch


def untouched_random_state(device: torch.device) -> AbstractContextManager:
    """Puts the random states of the CPU and of one device back at the end of the block.

    Other GPUs belong to other processes: PyTorch's default would go through all of them, and warn.
    """
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
