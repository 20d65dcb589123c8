"""Distances between the channels of two feature maps: the costs that channel matching minimises."""

import torch
import torch.nn.functional as F
from torch import Tensor

from d2kd.layers import upcast_half

#: Elements of the two normalized maps that exist at a time: 64 MiB in float32, or one image where that is more.
CHUNK_ELEMENTS = 1 << 24


@torch.no_grad()
def channel_distances(student: Tensor, teacher: Tensor, chunk_elements: int = CHUNK_ELEMENTS) -> Tensor:
    """Returns squared distances between L2-normalized channel maps, summed over the images of a batch.

    Every channel of every image is flattened over space and divided by its norm, not centered: entry (s, c) is
    sum_b || u_bs - v_bc ||^2 = sum_b 2 - 2 <u_bs, v_bc> (Yue et al., "Matching Guided Distillation", ECCV 2020).

    Args:
        student: (N, Cs, H, W), any floating type.
        teacher: (N, Ct, H, W).
        chunk_elements: images are taken together up to so many elements of both maps.

    Returns:
        (Cs, Ct) in float32 or more, each entry between 0 and 4 N. A channel that is zero in an image is at distance 2
        from all others there.
    """
    n, cs, h, w = student.shape
    step = max(1, chunk_elements // max(1, (cs + teacher.shape[1]) * h * w))
    with torch.autocast(student.device.type, enabled=False):  # half precision would blur the fifth digit that decides
        products = student.new_zeros(cs, teacher.shape[1], dtype=upcast_half(student[:0]).dtype)
        for s, t in zip(student.split(step), teacher.split(step)):
            products = torch.addbmm(products, _unit(s), _unit(t).to(products.dtype).transpose(1, 2))
    return products.mul_(-2.0).add_(2.0 * n)


def _unit(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, H*W) of unit length along the last axis."""
    return F.normalize(upcast_half(x.flatten(2)), dim=2, eps=1e-12)
