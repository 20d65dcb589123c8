"""Alignment of the resolutions of two feature maps: resampling and cropping."""

import torch.nn.functional as F
from torch import Tensor


def align_resolution(student: Tensor, teacher: Tensor, stride_ratio: float = 1.0) -> tuple[Tensor, Tensor]:
    """Brings the teacher's map to the student's grid.

    Both maps start at the same image corner; padding lies at the bottom right. So maps of equal stride are cropped to
    what they share, and a teacher of another stride is resampled first (bilinear, antialiased when it shrinks).

    Args:
        student: (N, Cs, Hs, Ws).
        teacher: (N, Ct, Ht, Wt), takes no gradient.
        stride_ratio: teacher stride / student stride.

    Returns:
        The two maps with equal H and W.
    """
    if stride_ratio != 1.0:
        size = [max(1, round(n * stride_ratio)) for n in teacher.shape[-2:]]
        teacher = F.interpolate(
            teacher.float(), size=size, mode="bilinear", align_corners=False, antialias=stride_ratio < 1.0
        )
    h = min(student.shape[-2], teacher.shape[-2])
    w = min(student.shape[-1], teacher.shape[-1])
    return student[..., :h, :w], teacher[..., :h, :w]


def align_validity(valid: Tensor, stride_ratio: float, size: tuple[int, int]) -> Tensor:
    """Brings a teacher's validity map to the student's grid: a cell is valid if all that it is resampled from is.

    Args:
        valid: (N, Ht, Wt) bool.
        stride_ratio: teacher stride / student stride.
        size: H and W of the aligned maps.

    Returns:
        (N, H, W) bool.
    """
    maps = valid[:, None].float()
    if stride_ratio != 1.0:
        _, maps = align_resolution(maps.new_empty(1, 1, *size), maps, stride_ratio)
    return maps[:, 0, : size[0], : size[1]] > 1.0 - 1e-4
