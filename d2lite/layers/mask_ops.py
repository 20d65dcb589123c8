"""Pasting of the small square masks that heads predict into full images."""

import torch
from torch import Tensor

_MAX_CHUNK_BYTES = 2**29


def paste_masks_in_image(masks: Tensor, boxes: Tensor, image_shape: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Resizes every mask to its box, bilinearly, and puts it where the box is in an otherwise empty image.

    Args:
        masks: (N, M, M) with values in [0, 1].
        boxes: `Boxes` or (N, 4) tensor, XYXY in pixels of the image; may reach outside of it.
        image_shape: (height, width).
        threshold: mask values >= this are set. If negative, the soft values are returned.

    Returns:
        (N, height, width), bool; or uint8 with values 0..255 if `threshold` is negative or N is 0.
    """
    assert masks.shape[-1] == masks.shape[-2], f"masks must be square, got {list(masks.shape)}"
    if not isinstance(boxes, Tensor):
        boxes = boxes.tensor
    assert len(boxes) == len(masks), f"{len(masks)} masks but {len(boxes)} boxes"
    height, width = int(image_shape[0]), int(image_shape[1])
    if len(masks) == 0:
        return masks.new_empty((0, height, width), dtype=torch.uint8)

    masks, boxes = masks.detach().float(), boxes.detach()
    rows = _interpolation_weights(boxes[:, 1], boxes[:, 3], height, masks.shape[-1])
    columns = _interpolation_weights(boxes[:, 0], boxes[:, 2], width, masks.shape[-1])
    if masks.device.type == "cpu":
        return _paste_regions(masks, boxes, rows, columns, threshold)
    return _paste_chunks(masks, rows, columns, threshold)


def _interpolation_weights(lo: Tensor, hi: Tensor, length: int, mask_size: int) -> Tensor:
    """Weights (N, length, mask_size) of the mask's cells in every pixel along one axis.

    Bilinear interpolation is separable: a pixel center that falls on the mask coordinate u takes
    `max(0, 1 - |u - j|)` of cell j, and less than everything where u leaves the mask. Pixels more
    than one away from the box [lo, hi] take nothing.
    """
    lo, hi = lo.float()[:, None], hi.float()[:, None]
    start, end = _pixel_range(lo, hi, length)
    pixel = torch.arange(length, device=lo.device, dtype=torch.float32)
    u = (pixel + 0.5 - lo) / (hi - lo) * mask_size - 0.5
    # A box without extent has no inner coordinate: all pixels at it show the middle of the mask.
    u = torch.where(u.isfinite(), u, (mask_size - 1) / 2)
    cell = torch.arange(mask_size, device=lo.device, dtype=torch.float32)
    weights = (1 - (u[:, :, None] - cell).abs_()).clamp_(min=0)
    return weights.mul_(((pixel >= start) & (pixel < end))[:, :, None])


def _pixel_range(lo: Tensor, hi: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """First pixel, and the one after the last, that a box from `lo` to `hi` can touch."""
    return (lo.floor() - 1).clamp(0, length), (hi.ceil() + 1).clamp(0, length)


def _paste_chunks(
    masks: Tensor, rows: Tensor, columns: Tensor, threshold: float, max_bytes: int = _MAX_CHUNK_BYTES
) -> Tensor:
    """Pastes all masks at once, or as many at a time as bounded memory allows."""
    bytes_per_mask = rows.shape[1] * columns.shape[1] * masks.element_size()
    n = max(1, max_bytes // max(1, bytes_per_mask))
    chunks = zip(masks.split(n), rows.split(n), columns.split(n))
    return torch.cat([_to_output(r @ m @ c.mT, threshold) for m, r, c in chunks])


def _paste_regions(masks: Tensor, boxes: Tensor, rows: Tensor, columns: Tensor, threshold: float) -> Tensor:
    """Computes only the pixels around each box, because most of an image lies outside."""
    height, width = rows.shape[1], columns.shape[1]
    dtype = torch.bool if threshold >= 0 else torch.uint8
    image = torch.zeros((len(masks), height, width), dtype=dtype)
    y0, y1 = _pixel_range(boxes[:, 1].float(), boxes[:, 3].float(), height)
    x0, x1 = _pixel_range(boxes[:, 0].float(), boxes[:, 2].float(), width)
    regions: list[list[int]] = torch.stack((y0, y1, x0, x1), dim=1).nan_to_num_().long().tolist()
    for i, (top, bottom, left, right) in enumerate(regions):
        values = rows[i, top:bottom] @ masks[i] @ columns[i, left:right].T
        image[i, top:bottom, left:right] = _to_output(values, threshold)
    return image


def _to_output(values: Tensor, threshold: float) -> Tensor:
    """Binarizes at `threshold`, or scales to bytes if it is negative."""
    return values >= threshold if threshold >= 0 else (values * 255).to(torch.uint8)
