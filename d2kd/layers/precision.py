"""Precision of sums."""

import torch
from torch import Tensor


def upcast_half(x: Tensor) -> Tensor:
    """Returns float32 for half-precision types, else the tensor itself: sums over a map need the digits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
