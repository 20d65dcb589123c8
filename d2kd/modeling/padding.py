"""How a model pads the images of a batch."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from d2kd.errors import UserError

#: Height and width in pixels.
Size = tuple[int, int]


class ImageSizeError(UserError):
    """An image that a model cannot see as a whole."""


class Padding(NamedTuple):
    """How a model pads its images, at the right and the bottom, after they are normalized."""

    #: Height and width become multiples of it.
    divisor: int = 1
    #: Side of the square that they become, in pixels; 0 for none.
    square: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> "Padding":
        """Returns what the backbone of a Detectron2 model asks for."""
        backbone = getattr(model, "backbone", None)
        constraints = dict(getattr(backbone, "padding_constraints", None) or {})
        divisor = constraints.get("size_divisibility", getattr(backbone, "size_divisibility", 1))
        return cls(max(int(divisor or 1), 1), int(constraints.get("square_size", 0)))

    def require_fit(self, batched_inputs: Sequence[Mapping[str, Any]]) -> None:
        """
        Args:
            batched_inputs: in Detectron2's format, with "image" (C, H, W).

        Raises:
            ImageSizeError: an image is larger than the square, which Detectron2 would cut off what stands out of.
        """
        largest = max((side for x in batched_inputs for side in x["image"].shape[-2:]), default=0)
        if 0 < self.square < largest:
            raise ImageSizeError(
                f"An image has a side of {largest} pixels, and the model pads images to squares of {self.square} "
                "(MODEL.VIT.SQUARE_PAD): set INPUT.MAX_SIZE_TRAIN and MAX_SIZE_TEST to at most that, or that to 0; a "
                "teacher's in DISTILL.TEACHER.OPTS."
            )

    def canvas(self, sizes: Sequence[Size]) -> Size:
        """Returns the height and width of a batch of images."""
        height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
        if self.square:
            height, width = max(height, self.square), max(width, self.square)
        return -(-height // self.divisor) * self.divisor, -(-width // self.divisor) * self.divisor
