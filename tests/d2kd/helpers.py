"""Taps, maps and tensors for the tests of d2kd: the one place that makes and compares them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from d2kd.distillers import NormAffine, TapPair
from d2kd.layers import TapShape


def tap_shape(channels: int, stride: float) -> TapShape:
    """What is known of a tapped feature; stride 0 for vectors."""
    return TapShape(channels, stride)


def tap_pair(
    student: str,
    teacher: str | None = None,
    *,
    channels: tuple[int, int],
    strides: tuple[float, float] = (1.0, 1.0),
    holds: str = "",
    norm_scale: float | None = None,
) -> TapPair:
    """Two taps that are compared; channels and strides are of (student, teacher).

    The teacher's tap has the student's name unless it is given. `norm_scale` is the scale of the batch norm before the
    teacher's tap, None where there is no such norm.
    """
    norm = None
    if norm_scale is not None:
        norm = NormAffine(torch.full((channels[1],), norm_scale), torch.zeros(channels[1]))
    shapes = [tap_shape(*shape) for shape in zip(channels, strides)]
    return TapPair(student, teacher or student, *shapes, holds=holds, teacher_norm=norm)


def random_maps(
    tap: str, channels: tuple[int, int], images: int = 2, seed: int = 0, size: tuple[int, int] = (6, 5)
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Maps of student and teacher by the name of their tap, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = ({tap: torch.randn(images, c, *size, generator=generator)} for c in channels)
    return student, teacher


def same_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether both have the same names with bit-equal tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_recorded(got: Tensor, want: Any, *, loss: bool = False) -> None:
    """Fails where `got` is not the recorded value, up to rounding in its type; losses are held to more digits."""
    want = torch.as_tensor(want).to(got.dtype)
    error = ((got - want).abs().max() / want.abs().max()).item()
    if got.dtype == torch.double:
        assert error <= (1e-9 if loss else 1e-6)
    else:
        assert error <= (1e-5 if loss else 1e-4)
