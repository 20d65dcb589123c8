"""Random numbers: seeds derived from several numbers, and random states that a block of code leaves alone."""

import hashlib
from contextlib import AbstractContextManager

import torch


def derive_seed(*parts: int, num_bytes: int = 4) -> int:
    """Returns a seed that depends on all the numbers; neighbors give unrelated ones (a digest, not a sum).

    Args:
        num_bytes: size of the result, 0 to 256**num_bytes - 1.
    """
    key = ",".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=num_bytes).digest(), "little")


def preserve_rng_state(device: torch.device) -> AbstractContextManager[None]:
    """Restores the random states of the CPU and of one device at the end of the block.

    Other GPUs belong to other processes: PyTorch's default would go through all of them, and warn.
    """
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
