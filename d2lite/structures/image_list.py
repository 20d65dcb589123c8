"""Images of different sizes in one padded tensor."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import device


class ImageList:
    """A batch of images, padded at the right and the bottom to a common size.

    Attributes:
        tensor: (N, H, W) or (N, C, H, W).
        image_sizes: (height, width) of each image without padding.
    """

    def __init__(self, tensor: torch.Tensor, image_sizes: list[tuple[int, int]]) -> None:
        self.tensor = tensor
        self.image_sizes = image_sizes

    @staticmethod
    def from_tensors(
        tensors: list[torch.Tensor],
        size_divisibility: int = 0,
        pad_value: float = 0.0,
        padding_constraints: dict[str, int] | None = None,
    ) -> "ImageList":
        """Pads images and stacks them.

        Args:
            tensors: images of shape (H_i, W_i) or (C, H_i, W_i), with the same C.
            size_divisibility: the common height and width become multiples of this, if above 1.
            pad_value: what the padding is filled with.
            padding_constraints: may hold `"size_divisibility"`, which then takes the place of the argument,
                and `"square_size"`: above 0, the common size is that square, in pixels.

        Returns:
            The batch; its size is the smallest that holds all images and the constraints.
        """
        assert isinstance(tensors, (list, tuple)) and len(tensors) > 0, "from_tensors needs a list of images"
        first = tensors[0]
        for image in tensors:
            assert isinstance(image, torch.Tensor), "from_tensors needs images that are tensors"
            assert image.shape[:-2] == first.shape[:-2], (
                f"Images of one batch differ in shape beyond height and width: {list(first.shape)} and "
                f"{list(image.shape)}"
            )
        image_sizes = [(image.shape[-2], image.shape[-1]) for image in tensors]
        height, width = _batch_size(image_sizes, size_divisibility, padding_constraints)

        if len(tensors) == 1:
            h, w = image_sizes[0]
            return ImageList(F.pad(first, [0, width - w, 0, height - h], value=pad_value)[None], image_sizes)
        batch = first.new_full([len(tensors)] + list(first.shape[:-2]) + [height, width], pad_value)
        for i, image in enumerate(tensors):
            batch[i, ..., : image.shape[-2], : image.shape[-1]].copy_(image)
        return ImageList(batch, image_sizes)

    @torch.jit.unused
    def to(self, *args: Any, **kwargs: Any) -> "ImageList":
        """Returns the batch with its tensor moved or cast, as by `torch.Tensor.to`."""
        return ImageList(self.tensor.to(*args, **kwargs), self.image_sizes)

    @property
    def device(self) -> device:
        """The device that holds the images."""
        return self.tensor.device

    def __len__(self) -> int:
        return len(self.image_sizes)

    def __getitem__(self, idx: int) -> torch.Tensor:
        """Returns image `idx` without its padding, (H_i, W_i) or (C, H_i, W_i)."""
        height, width = self.image_sizes[idx]
        return self.tensor[idx, ..., :height, :width]


def _batch_size(
    image_sizes: list[tuple[int, int]], size_divisibility: int, constraints: dict[str, int] | None
) -> tuple[int, int]:
    height = max([size[0] for size in image_sizes])
    width = max([size[1] for size in image_sizes])
    square_size = 0
    if constraints is not None:
        square_size = constraints.get("square_size", 0)
        size_divisibility = constraints.get("size_divisibility", size_divisibility)
    if square_size > 0:
        if max(height, width) > square_size:
            raise ValueError(
                f"Images of {height} x {width} do not fit the padding constraint square_size={square_size}: "
                "lower INPUT.MAX_SIZE_TRAIN and INPUT.MAX_SIZE_TEST, or raise square_size."
            )
        height, width = square_size, square_size
    if size_divisibility > 1:
        height = -(-height // size_divisibility) * size_divisibility
        width = -(-width // size_divisibility) * size_divisibility
    return height, width
