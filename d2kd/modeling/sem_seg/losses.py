"""Resizing of per-pixel logits, and the cross entropy and accuracy of pixels of which some have no class."""

import torch.nn.functional as F
from torch import Tensor

from d2kd.layers import upcast_half

#: Values of MODEL.SEM_SEG_HEAD.LOSS_AVERAGE.
LOSS_AVERAGES = ("valid", "all")


def resize_logits(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Returns logits (N, K, H, W) at another size, bilinear and in float32 or more.

    Args:
        logits: of any floating type; half precision is too coarse between classes that are nearly as probable.
        size: H and W, in pixels.
        align_corners: whether the centers of the corner pixels coincide, and not the corners of the images.
    """
    logits = upcast_half(logits)
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=align_corners)


def pixel_cross_entropy(logits: Tensor, labels: Tensor, ignore_value: int, average: str) -> Tensor:
    """Cross entropy over the pixels that have a class.

    Args:
        logits: (N, K, H, W) in float32 or more.
        labels: (N, H, W), int64, a class or `ignore_value`.
        ignore_value: of pixels without a class.
        average: what the sum is divided by: "valid", the pixels that have a class | "all", all pixels, so that a batch
            with few labels counts less.

    Returns:
        A scalar; 0, with gradient 0, where no pixel has a class.
    """
    total = F.cross_entropy(logits, labels, reduction="sum", ignore_index=ignore_value)
    if average == "all":
        return total / max(labels.numel(), 1)
    return total / (labels != ignore_value).sum().clamp(min=1)


def pixel_accuracy(logits: Tensor, labels: Tensor, ignore_value: int) -> Tensor:
    """Returns the share of pixels whose most probable class is the right one, in percent of those that have a class.

    Args:
        logits, labels, ignore_value: as for `pixel_cross_entropy`.

    Returns:
        A scalar, 0 to 100; 0 where no pixel has a class.
    """
    valid = labels != ignore_value
    right = (logits.argmax(1) == labels) & valid
    return 100.0 * right.sum() / valid.sum().clamp(min=1)
