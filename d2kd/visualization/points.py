"""The points that a model has put on an object, drawn over the image."""

import cv2
import numpy as np


def draw_points(image: np.ndarray, points: np.ndarray, color: tuple[int, int, int], radius: int = 3) -> None:
    """Draws points as discs with a dark rim, in place; those outside the image are left out.

    Args:
        image: uint8 (H, W, 3) BGR.
        points: (P, 2) x and y in pixels of the image.
        color: BGR.
        radius: of the disc, in pixels.
    """
    for x, y in np.rint(points).astype(int).tolist():
        cv2.circle(image, (x, y), radius + 1, (0, 0, 0), -1, cv2.LINE_AA)
        cv2.circle(image, (x, y), radius, color, -1, cv2.LINE_AA)
