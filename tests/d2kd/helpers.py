"""Taps, maps and tensors for the tests of d2kd: the one place that makes and compares them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from d2kd.distillers import NormAffine, Prediction, TapInfo, TapPair


def tap_pair(
    student: str,
    teacher: str | None = None,
    *,
    channels: tuple[int, int],
    strides: tuple[float, float] = (1.0, 1.0),
    prediction: Prediction | None = None,
    norm_scale: float | None = None,
) -> TapPair:
    """Two taps that are compared; channels and strides (0 for vectors) are of (student, teacher).

    The teacher's tap has the student's name unless it is given. `norm_scale` is the scale of the batch norm before the
    teacher's tap, None where there is no such norm. Both make the same prediction, if any.
    """
    norm = None
    if norm_scale is not None:
        norm = NormAffine(torch.full((channels[1],), norm_scale), torch.zeros(channels[1]))
    return TapPair(
        TapInfo(student, channels[0], strides[0], prediction),
        TapInfo(teacher or student, channels[1], strides[1], prediction, norm),
    )


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
