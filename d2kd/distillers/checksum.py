"""Identifies a model by a checksum of its weights."""

import hashlib
from collections.abc import Mapping

from torch import Tensor


def weights_checksum(state: Mapping[str, Tensor]) -> str:
    """Returns a checksum of a state dict: names, shapes and values of its floating-point tensors, wherever they lie.

    It tells weights apart, not files: the same weights have it in any checkpoint format.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        value = state[name]
        if value.is_floating_point():
            value = value.detach().float().cpu().contiguous()
            digest.update(f"{name} {tuple(value.shape)} ".encode())
            digest.update(value.numpy().reshape(-1).view("uint8").data)
    return digest.hexdigest()
