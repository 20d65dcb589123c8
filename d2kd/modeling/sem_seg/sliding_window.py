"""Sliding windows: the logits of an image from overlapping parts of it."""

from collections.abc import Callable, Sequence

from torch import Tensor

#: From parts (C, h, w) of one size to their logits (K, h, w).
Predict = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class SlidingWindows:
    """Windows of one size over an image; where they overlap, their logits are averaged.

    The last window of a row or column is moved back into the image, so that all see as much. An image that is smaller
    than a window along a side is one window there.
    """

    def __init__(self, size: tuple[int, int], stride: tuple[int, int], batch: int = 4) -> None:
        """
        Args:
            size: height and width of a window, in pixels.
            stride: rows and columns between the starts of two windows, at most their size.
            batch: windows that are predicted together, which bounds the memory.
        """
        self.size = size
        self.stride = stride
        self.batch = batch

    def corners(self, height: int, width: int) -> list[tuple[int, int]]:
        """Returns the upper left corners (y, x) of the windows over an image, row by row."""
        rows, columns = (
            _starts(length, size, stride) for length, size, stride in zip((height, width), self.size, self.stride)
        )
        return [(y, x) for y in rows for x in columns]

    def __call__(self, image: Tensor, predict: Predict) -> Tensor:
        """
        Args:
            image: (C, H, W).
            predict: gives the logits of some windows.

        Returns:
            (K, H, W), the mean logits.
        """
        height, width = image.shape[-2:]
        h, w = min(self.size[0], height), min(self.size[1], width)
        corners = self.corners(height, width)
        total = count = image.new_zeros(())
        for first in range(0, len(corners), self.batch):
            part = corners[first : first + self.batch]
            for (y, x), logits in zip(part, predict([image[:, y : y + h, x : x + w] for y, x in part])):
                if not total.dim():
                    total = logits.new_zeros(logits.shape[0], height, width)
                    count = logits.new_zeros(height, width)
                total[:, y : y + h, x : x + w] += logits
                count[y : y + h, x : x + w] += 1
        return total / count


def _starts(length: int, size: int, stride: int) -> list[int]:
    """Where windows start along a side, in pixels."""
    steps = -(-max(length - size, 0) // stride)
    return [max(min(i * stride + size, length) - size, 0) for i in range(steps + 1)]
