"""What a map has around that of an image that is seen alone."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from d2kd.errors import UserError


class PaddingError(UserError):
    """A teacher whose maps cannot be put into those of a batch."""


@contextlib.contextmanager
def without_images(model: nn.Module) -> Iterator[None]:
    """Inside the block, the backbone gets padding in place of the images of a batch.

    Raises:
        PaddingError: the model has no backbone that is called with a batch of padded images.
    """
    cleared: list[bool] = []

    def clear(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not arguments or not isinstance(arguments[0], Tensor) or arguments[0].dim() != 4:
            return None
        cleared.append(True)
        return (torch.zeros_like(arguments[0]), *arguments[1:])

    backbone = getattr(model, "backbone", None)
    handle = backbone.register_forward_pre_hook(clear) if isinstance(backbone, nn.Module) else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
    if not cleared:
        raise PaddingError(
            f"DISTILL.CACHE.RUN is image, and a {type(model).__name__} has no backbone that is called with a batch of "
            "padded images: set it to batch."
        )


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
