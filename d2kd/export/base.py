"""What an exported network is: a module that takes images and gives tensors, by META_ARCHITECTURE."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kd.errors import UserError

#: Modules that can be exported, by META_ARCHITECTURE; see `register_export`.
EXPORTS: dict[str, type["Exported"]] = {}


class ExportError(UserError):
    """A model that cannot be exported, or an exported file that does not give what the model gives."""


class Exported(nn.Module):
    """A trained model as a function of tensors, with post-processing inside: what is written to a file.

    A family of models derives from it in a file of its own, under the META_ARCHITECTURE that it takes. It uses the
    modules of the trained model, and computes everything that depends on the size of an image from the shapes of
    tensors, so that a file which was made with one image is right on all others.

    It takes images (N, 3, H, W) of one size, in float32 from 0 to 255, in the order of channels and the size that the
    model was trained on. What it gives is told by `OUTPUTS`.

    Attributes:
        TASK: "detection", "segmentation" or "classification".
        OUTPUTS: names of the tensors that it gives, in their order.
        fixed_side: the only side, in pixels, of the images that it takes; 0 for all sizes.
        for_onnx: whether suppression is ONNX's NonMaxSuppression instead of torchvision's.
    """

    TASK: ClassVar[str] = ""
    OUTPUTS: tuple[str, ...] = ()

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: trained, in eval mode, on the CPU.

        Raises:
            ExportError: it has parts that cannot be exported.
        """
        super().__init__()
        self.for_onnx = False
        self.fixed_side = 0
        self.model: Any = model  # Detectron2's models are untyped

    @property
    def num_classes(self) -> int:
        """Classes that the network tells apart."""
        return int(self.model.num_classes)

    @property
    def align_corners(self) -> bool:
        """How the maps that it gives are brought to another size, see `torch.nn.functional.interpolate`."""
        return False

    @property
    def divisor(self) -> int:
        """Sides of images are padded to multiples of it, in pixels."""
        constraints = getattr(self.model.backbone, "padding_constraints", None) or {}
        return int(constraints.get("size_divisibility", self.model.backbone.size_divisibility))

    def normalized(self, images: Tensor) -> Tensor:
        """Returns images (N, 3, H, W) normalized, and padded as Detectron2's `ImageList` pads them."""
        images = (images - self.model.pixel_mean.float()) / self.model.pixel_std.float()
        constraints = getattr(self.model.backbone, "padding_constraints", None) or {}
        square = int(constraints.get("square_size", 0))
        if square > 0 or self.divisor > 1:
            height, width = (_missing(images.shape[side], square, self.divisor) for side in (2, 3))
            images = F.pad(images, [0, width, 0, height])
        return images.to(next(self.model.backbone.parameters()).dtype)

    def lower_threshold(self, images: Sequence[Tensor]) -> Any:
        """Lowers the least score of a detection so far that there are some on these images, for a verification.

        Returns:
            The threshold before, for `restore_threshold`; None where nothing was changed.
        """
        return None

    def restore_threshold(self, threshold: Any) -> None:
        """Sets the least score of a detection."""
        raise NotImplementedError

    def eager(self, images: Tensor) -> tuple[Tensor, ...]:
        """Returns what the trained model itself gives on images (N, 3, H, W), as the tensors of `OUTPUTS`."""
        raise NotImplementedError


def _missing(length: Any, square: int, divisor: int) -> Any:
    """Pixels that a side lacks; a number, or in a trace the tensor that it is computed from."""
    if square > 0:
        missing = square - length
        # an image larger than the square must fail in the network, and not be cropped
        return missing.clamp(min=0) if isinstance(missing, Tensor) else max(missing, 0)
    return (divisor - length % divisor) % divisor


def register_export(*names: str) -> Callable[[type[Exported]], type[Exported]]:
    """Registers a class as what is exported of some META_ARCHITECTURES; a decorator."""

    def register(cls: type[Exported]) -> type[Exported]:
        for name in names:
            if name in EXPORTS:
                raise ValueError(f"{name} is registered already, as {EXPORTS[name].__qualname__}.")
            EXPORTS[name] = cls
        return cls

    return register


def exported(model: nn.Module) -> Exported:
    """Returns what is exported of a model, by its class or the nearest of its base classes.

    Args:
        model: trained; it is put into eval mode.

    Raises:
        ExportError: there is no export of its architecture, or of a part of it.
    """
    for base in type(model).__mro__:
        if base.__name__ in EXPORTS:
            return EXPORTS[base.__name__](model.eval()).eval()
    raise ExportError(
        f"MODEL.META_ARCHITECTURE {type(model).__name__} has no export to ONNX or TorchScript; there is one of "
        f"{', '.join(sorted(EXPORTS))}. --format torch writes its weights and YAML."
    )


def stacked_inputs(images: Tensor) -> list[dict[str, Any]]:
    """Returns images (N, 3, H, W) as the input of Detectron2's models."""
    return [{"image": image} for image in images]


def image_index(counts: list[int]) -> Tensor:
    """Returns the number of the image of each of `sum(counts)` detections."""
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
