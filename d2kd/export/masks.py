"""Masks of instances in the size of the image, as a graph."""

import torch
from torch import Tensor

from .detection import shape_number

#: Probability from which a pixel belongs to an instance, that of Detectron2's `detector_postprocess`.
MASK_THRESHOLD = 0.5


def pasted(masks: Tensor, boxes: Tensor, images: Tensor, threshold: float) -> Tensor:
    """Returns which pixels of an image belong to masks that were predicted inside boxes.

    Bilinear interpolation is separable, so that a mask in its place is a product of three matrices; what lies outside
    a mask is 0. This is what Detectron2's `paste_masks_in_image` gives.

    Args:
        masks: (D, M, M) probabilities.
        boxes: (D, 4) XYXY in pixels.
        images: (N, 3, H, W), for the size.
        threshold: least probability.

    Returns:
        (D, H, W) bool.
    """
    side = masks.shape[-1]
    rows = _weights(boxes[:, 1], boxes[:, 3], images, 2, side)
    columns = _weights(boxes[:, 0], boxes[:, 2], images, 3, side)
    return (rows @ masks @ columns.transpose(1, 2)) >= threshold


def _weights(low: Tensor, high: Tensor, images: Tensor, axis: int, side: int) -> Tensor:
    """Share (D, length, M) of each of M cells between `low` and `high` (D,) in each pixel along an axis."""
    pixel = torch.arange(images.shape[axis], dtype=torch.float32, device=low.device) + 0.5
    where = (pixel - low[:, None]) / (high - low)[:, None] * side - 0.5
    cell = torch.arange(side, dtype=torch.float32, device=low.device)
    weights = (1 - (where[..., None] - cell).abs()).clamp(min=0)
    # pixels further than one from the box have no share in it
    start, end = low.floor() - 1, (high.ceil() + 1).minimum(shape_number(images, axis))
    first = pixel - 0.5
    near = (first >= start[:, None]) & (first < end[:, None])
    return weights * near[..., None].to(weights.dtype)
