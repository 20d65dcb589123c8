"""Alignment of two feature maps: channels by a learned 1x1 convolution, resolution by resampling and cropping."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

#: Teacher and student strides may differ by this factor at most; beyond it the maps show different things.
MAX_STRIDE_RATIO = 8


class TapShape(NamedTuple):
    """What is known of a tapped feature before training: channels, and input pixels per cell (may be a fraction).

    The stride is 0 for features (R, C) that are one vector a region or image.
    """

    channels: int
    stride: float

    @property
    def is_vector(self) -> bool:
        """Whether the feature is (R, C) and not a map (N, C, H, W)."""
        return self.stride == 0


class AlignmentError(ValueError):
    """Two feature maps that no aligner can bring together."""


def build_aligner(student: TapShape, teacher: TapShape) -> nn.Module:
    """A 1x1 convolution (with bias) from student to teacher channels, or the identity where they are equal."""
    if student.channels == teacher.channels:
        return nn.Identity()
    return nn.Conv2d(student.channels, teacher.channels, kernel_size=1)


def check_alignable(where: str, student: TapShape, teacher: TapShape) -> None:
    """Raises AlignmentError, with both shapes and `where` (tap and configuration key), for maps too far apart."""
    if student.is_vector or teacher.is_vector:
        raise AlignmentError(
            f"{where}: this method compares maps (N, C, H, W), and one of these is a vector (R, C) a region or image."
        )
    ratio = max(student.stride, teacher.stride) / min(student.stride, teacher.stride)
    if ratio > MAX_STRIDE_RATIO:
        raise AlignmentError(
            f"{where}: the student's map has {student.channels} channels at stride {student.stride:g}, the teacher's "
            f"{teacher.channels} at stride {teacher.stride:g}. Strides may differ by a factor of {MAX_STRIDE_RATIO} "
            "at most."
        )


def align_resolution(student: Tensor, teacher: Tensor, stride_ratio: float = 1.0) -> tuple[Tensor, Tensor]:
    """Brings the teacher's map to the student's grid.

    Both maps start at the same image corner; padding lies at the bottom right. So maps of equal stride are cropped to
    what they share, and a teacher of another stride is resampled first (bilinear, antialiased when it shrinks).

    Args:
        student: (N, Cs, Hs, Ws).
        teacher: (N, Ct, Ht, Wt), takes no gradient.
        stride_ratio: teacher stride / student stride.

    Returns:
        The two maps with equal H and W; the very same tensors where nothing had to be done.
    """
    if stride_ratio == 1.0 and student.shape[-2:] == teacher.shape[-2:]:
        return student, teacher
    if stride_ratio != 1.0:
        size = [max(1, round(n * stride_ratio)) for n in teacher.shape[-2:]]
        teacher = F.interpolate(
            teacher.float(), size=size, mode="bilinear", align_corners=False, antialias=stride_ratio < 1.0
        )
    h = min(student.shape[-2], teacher.shape[-2])
    w = min(student.shape[-1], teacher.shape[-1])
    return student[..., :h, :w], teacher[..., :h, :w]
