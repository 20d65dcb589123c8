"""Padding: what an image becomes in a batch with larger ones, and how the teacher sees one image padded so."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kd.errors import UserError

#: Height and width in pixels.
Size = tuple[int, int]


class PaddingError(UserError):
    """A teacher whose padding cannot be that of a batch."""


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

    def canvas(self, sizes: Sequence[Size]) -> Size:
        """Returns the height and width of a batch of images."""
        height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
        if self.square:
            height, width = max(height, self.square), max(width, self.square)
        return -(-height // self.divisor) * self.divisor, -(-width // self.divisor) * self.divisor


class Canvas:
    """Shows a model one image on the canvas that a batch with others would have."""

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: of Detectron2, whose backbone is called with a batch of normalized images.
        """
        self.model = model
        self.padding = Padding.of(model)
        self._padded: dict[Size, Size] = {}

    @contextlib.contextmanager
    def __call__(self, canvas: Size, blank: bool = False) -> Iterator[None]:
        """Inside the block, the backbone gets the one image of a forward pass padded to a canvas.

        Args:
            canvas: of `Padding.canvas`; the model may pad to more.
            blank: nothing but padding.

        Raises:
            PaddingError: the model has no such backbone.
        """
        height, width = self._padded_size(canvas)
        seen: list[Size] = []

        def pad(images: Tensor) -> Tensor:
            images = F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))
            seen.append((images.shape[-2], images.shape[-1]))
            return torch.zeros_like(images) if blank else images

        with self._changing_images(pad):
            yield
        if seen[:1] != [(height, width)]:
            raise self._error()

    def _padded_size(self, canvas: Size) -> Size:
        """What the model itself makes of images of that size."""
        if canvas not in self._padded:
            seen: list[Size] = []

            def note(images: Tensor) -> Tensor:
                seen.append((images.shape[-2], images.shape[-1]))
                raise _Seen

            image = torch.zeros((3, *canvas), dtype=torch.uint8, device=next(self.model.parameters()).device)
            with self._changing_images(note), contextlib.suppress(_Seen), torch.no_grad():
                self.model([{"image": image, "height": canvas[0], "width": canvas[1]}])
            if not seen:
                raise self._error()
            self._padded[canvas] = seen[0]
        return self._padded[canvas]

    @contextlib.contextmanager
    def _changing_images(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not arguments or not isinstance(arguments[0], Tensor) or arguments[0].dim() != 4:
                return None
            return (change(arguments[0]), *arguments[1:])

        backbone = getattr(self.model, "backbone", None)
        if not isinstance(backbone, nn.Module):
            raise self._error()
        handle = backbone.register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def _error(self) -> PaddingError:
        return PaddingError(
            f"DISTILL.CACHE.DIR: a {type(self.model).__name__} has no backbone that is called with a batch of padded "
            'images, so the cache cannot pad them as its batches are. Set it to "", and the teacher runs.'
        )


class _Seen(Exception):
    """Ends a forward pass whose only purpose was its first step."""


def paste(blank: Tensor, feature: Tensor) -> Tensor:
    """Returns a map of a canvas with that of an image at the top left; a feature of equal shape as it is.

    Args:
        blank: (1, C, H, W) of the canvas without an image.
        feature: (1, C, h, w), not larger.
    """
    if feature.shape == blank.shape:
        return feature
    whole = blank.clone()
    whole[..., : feature.shape[-2], : feature.shape[-1]] = feature
    return whole
