"""Alignment of the resolutions of two feature maps: resampling and cropping."""

import math

import torch.nn.functional as F
from torch import Tensor


def rescale(maps: Tensor, ratio: float) -> Tensor:
    """Brings maps to another stride: cell i of the result covers what cell i covers on a grid from the same corner.

    Bilinear, antialiased where they shrink. The scale is `ratio` also where that comes to no whole number of cells: the
    size alone would stretch the maps. What the last cells then lack is taken to be as the edge is.

    Args:
        maps: (N, C, H, W), floating point.
        ratio: stride of the maps / stride of the result.

    Returns:
        (N, C, ceil(H * ratio), ceil(W * ratio)).
    """
    if ratio == 1.0:
        return maps
    before = maps.shape[-2:]
    h, w = (max(1, math.ceil(n * ratio - 1e-6)) for n in before)
    if h == before[0] * ratio and w == before[1] * ratio:
        return F.interpolate(maps, size=(h, w), mode="bilinear", align_corners=False, antialias=ratio < 1.0)
    missing = [math.ceil(n / ratio - 1e-6) - have for n, have in zip((h, w), before)]
    maps = F.pad(maps, (0, max(0, missing[1]), 0, max(0, missing[0])), mode="replicate")
    scaled = F.interpolate(
        maps,
        scale_factor=ratio,
        mode="bilinear",
        align_corners=False,
        antialias=ratio < 1.0,
        recompute_scale_factor=False,
    )
    return scaled[..., :h, :w]


def align_resolution(student: Tensor, teacher: Tensor, stride_ratio: float = 1.0) -> tuple[Tensor, Tensor]:
    """Brings the teacher's map to the student's grid.

    Both maps start at the same image corner; padding lies at the bottom right. So maps of equal stride are cropped to
    what they share, and a teacher of another stride is resampled first (`rescale`).

    Args:
        student: (N, Cs, Hs, Ws).
        teacher: (N, Ct, Ht, Wt), takes no gradient.
        stride_ratio: teacher stride / student stride.

    Returns:
        The two maps with equal H and W.
    """
    if stride_ratio != 1.0:
        teacher = rescale(teacher.float(), stride_ratio)
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
