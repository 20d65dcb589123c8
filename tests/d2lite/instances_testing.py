"""Random boxes, and comparison of instances."""

import numpy as np
import torch

from d2lite.structures import Boxes, Instances, ROIMasks


def random_boxes(num_boxes: int, max_coord: float = 100, device: str = "cpu") -> torch.Tensor:
    """Returns random XYXY boxes, (num_boxes, 4), with sides of at least 1 and coordinates up to `max_coord`."""
    corners = (torch.rand(num_boxes, 4, device=device) * (max_coord * 0.5)).clamp_(min=1.0)
    corners[:, 2:] += corners[:, :2]
    return corners


def assert_instances_allclose(
    input: Instances, other: Instances, *, rtol: float = 1e-5, msg: str = "", size_as_tensor: bool = False
) -> None:
    """Raises AssertionError unless both have the same fields with nearly the same content.

    Args:
        input, other: what to compare.
        rtol: tolerance relative to the image's size for boxes, and to the largest value for other numbers;
            integers must be equal.
        msg: put before the error message.
        size_as_tensor: the image sizes may be tensors.
    """
    msg = f"{msg}: " if msg else ""
    sizes = [tuple(torch.as_tensor(x.image_size).tolist() if size_as_tensor else x.image_size) for x in (input, other)]
    assert sizes[0] == sizes[1], f"{msg}image sizes are {sizes[0]} and {sizes[1]}"
    names = [sorted(x.get_fields()) for x in (input, other)]
    assert names[0] == names[1], f"{msg}fields are {names[0]} and {names[1]}"
    for name in names[0]:
        a, b = input.get(name), other.get(name)
        scale = float(np.prod(sizes[0])) ** 0.5 if isinstance(a, Boxes) else None
        if isinstance(a, (Boxes, ROIMasks)):
            a, b = a.tensor, b.tensor
        assert isinstance(a, torch.Tensor), f"{msg}field {name} of type {type(a)} cannot be compared"
        assert _is_close(a, b, rtol, scale), f"{msg}field {name} differs: {a} and {b}"


def _is_close(a: torch.Tensor, b: torch.Tensor, rtol: float, scale: "float | None") -> bool:
    if a.shape != b.shape or not a.dtype.is_floating_point:
        return torch.equal(a, b)
    if scale is None:
        scale = a.abs().max().item() if a.numel() else 0.0
    return torch.allclose(a, b, rtol=0, atol=rtol * scale)
