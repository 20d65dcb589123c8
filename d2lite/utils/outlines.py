"""Outlines of instance masks, for drawing."""

from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util

__all__ = ["has_holes", "instance_rings", "mask_contours", "rings_box"]


def instance_rings(mask: Any, height: int, width: int) -> list[np.ndarray]:
    """Returns the outlines of one instance as closed lines of points (K, 2).

    Args:
        mask: COCO polygons, a COCO RLE (compressed or not), or a bitmap.
        height, width: of the image, in pixels.

    Raises:
        ValueError: if the bitmap or RLE has another size.
    """
    if isinstance(mask, (list, tuple)):
        return [np.asarray(p, dtype=np.float64).reshape(-1, 2) for p in mask]
    if isinstance(mask, dict):
        if isinstance(mask["counts"], list):
            mask = mask_util.frPyObjects(mask, *mask["size"])
        mask = mask_util.decode(mask)
    mask = np.asarray(mask)
    if mask.shape != (height, width):
        raise ValueError(f"A mask of shape {mask.shape} does not fit the image of {height} x {width}")
    return mask_contours(mask)


def mask_contours(mask: np.ndarray) -> list[np.ndarray]:
    """Returns the outlines of a bitmap (H, W), (K, 2) each; those of holes have the opposite orientation."""
    # Magnified by two, contours through pixel centers become contours along pixel edges.
    big = cv2.resize(mask.astype(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    found = cv2.findContours(big, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)[-2]
    return [(c.reshape(-1, 2) + 0.5) / 2 for c in found if len(c) >= 3]


def has_holes(mask: np.ndarray) -> bool:
    """Returns whether a bitmap (H, W) has unset pixels that set ones enclose."""
    hierarchy = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)[-1]
    # The last number of a contour is the one around it, -1 for none.
    return hierarchy is not None and bool((hierarchy[..., 3] >= 0).any())


def rings_box(rings: list[np.ndarray]) -> np.ndarray:
    """Returns the box (x0, y0, x1, y1) around all points; zeros without any."""
    if not rings:
        return np.zeros(4)
    points = np.concatenate(rings)
    return np.concatenate((points.min(axis=0), points.max(axis=0)))
