"""Divergences between the predictions of two classifiers, softened by a temperature."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from d2kd.layers import softplus, upcast_half


def softmax_divergence(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """T^2 KL(softmax(t/T) || softmax(s/T)) over the classes (Hinton et al., arXiv 1503.02531, section 2).

    T^2 keeps the gradient's size when T changes.

    Args:
        student: logits (N, K) or (N, K, H, W).
        teacher: the same shape, takes no gradient.
        temperature: T, above 0.
        valid: (N, H, W) bool, the positions that count; None is all.

    Returns:
        A scalar: the mean over rows (and valid positions); 0, and connected to the student, where there are none.
    """
    divergences = _categorical(student, teacher, temperature, dim=1).sum(1)
    return temperature**2 * _mean(divergences, valid)


def pooled_divergence(
    student: Tensor, teacher: Tensor, temperature: float, cells: int, valid: Tensor | None = None
) -> Tensor:
    """As `softmax_divergence`, of probabilities that are averaged over the student's pixels in each of the teacher's.

    Args:
        student: logits (N, K, H * cells, W * cells); what is missing at the lower and right border is left out.
        teacher: logits (N, K, H, W), takes no gradient.
        temperature: T, above 0.
        cells: pixels of the student along the side of one of the teacher's.
        valid: (N, H, W) bool, the teacher's pixels that count; None is all.

    Returns:
        A scalar; 0, and connected to the student, where no pixel is valid.
    """
    ours = (upcast_half(student) / temperature).softmax(1)
    ours = F.avg_pool2d(ours, cells, ceil_mode=True, count_include_pad=False)
    theirs = F.log_softmax(upcast_half(teacher) / temperature, 1)
    height, width = min(ours.shape[2], theirs.shape[2]), min(ours.shape[3], theirs.shape[3])
    ours, theirs = ours[..., :height, :width], theirs[..., :height, :width]
    valid = None if valid is None else valid[:, :height, :width]
    ours = ours.clamp(min=torch.finfo(ours.dtype).tiny).log()
    return temperature**2 * _mean(F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1), valid)


def spatial_divergence(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """T^2 KL(softmax_hw(t/T) || softmax_hw(s/T)): each class is a distribution over positions.

    Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction" (ICCV 2021), averaged over images and classes
    as in the segmentation recipes of Yang et al., "Masked Generative Distillation" (2022).

    Args:
        student: logits (N, K, H, W).
        teacher: the same shape, takes no gradient.
        temperature: T, above 0.
        valid: (N, H, W) bool, the positions that there are; None is all.

    Returns:
        A scalar.
    """
    if valid is not None:
        known = valid[:, None]
        # finite: an image without any position would have NaN gradients
        student, teacher = (upcast_half(x).where(known, -1e4 * temperature) for x in (student, teacher))
    divergences = _categorical(student.flatten(2), teacher.flatten(2), temperature, dim=2)
    if valid is not None:
        divergences = divergences.where(valid.flatten(1)[:, None], 0)
    return temperature**2 * divergences.sum() / max(1, student.shape[0] * student.shape[1])


def binary_divergence(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """T^2 KL(sigmoid(t/T) || sigmoid(s/T)) of independent binary classifiers, summed.

    Args:
        student: logits of any shape.
        teacher: the same shape, takes no gradient.
        temperature: T, above 0.
        valid: (N, H, W) bool for logits (N, K, H, W), the positions that count; None is all.

    Returns:
        A scalar; 0, and connected to the student, for tensors without elements. Its gradient cannot be differentiated
        again.
    """
    student, teacher = upcast_half(student) / temperature, upcast_half(teacher) / temperature
    if valid is not None:
        student, teacher = (x.where(valid[:, None], 0) for x in (student, teacher))
    divergence: Tensor = _BinaryDivergence.apply(student, teacher.detach())
    return temperature**2 * divergence


class _BinaryDivergence(torch.autograd.Function):
    """Sums softplus(s) - softplus(t) - p (s - t) with p = sigmoid(t), whose slope is sigmoid(s) - p."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        target = teacher.sigmoid()
        ctx.save_for_backward(student.sigmoid().sub_(target))
        return softplus(student).sub_(softplus(teacher)).sub_(target.mul_(student - teacher)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return slope * gradient, None


def distance_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(t/T) || softmax(s/T)) of the distance to each side of a box (as in arXiv 2102.12252, equation 3).

    Args:
        student: (M, 4 * B) logits of B distances for each side.
        teacher: the same shape, takes no gradient.
        temperature: T, above 0.

    Returns:
        (M,), the mean over the four sides.
    """
    ours, theirs = (x.unflatten(1, (4, -1)) for x in (student, teacher))
    return temperature**2 * _categorical(ours, theirs, temperature, dim=2).sum(2).mean(1)


def hard_label_cross_entropy(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, valid: Tensor | None = None
) -> Tensor:
    """Cross entropy of the student to the teacher's most probable class ("hard" distillation, arXiv 2012.12877, eq. 3).

    Args:
        student: logits (N, K) or (N, K, H, W).
        teacher: the same shape, takes no gradient.
        temperature: has no effect.
        valid: (N, H, W) bool, the positions that count; None is all.

    Returns:
        A scalar: the mean over rows (and valid positions); 0, and connected to the student, where there are none.
    """
    if not student.numel():
        return student.sum()
    return _mean(F.cross_entropy(upcast_half(student), teacher.argmax(1), reduction="none"), valid)


def soft_count(logits: Tensor) -> Tensor:
    """Returns a soft count of positives: the sum of squared probabilities of binary classifiers, a scalar.

    Confident ones count as 1, and the many small ones of the background hardly at all.
    """
    return upcast_half(logits).sigmoid().square().sum()


def _categorical(student: Tensor, teacher: Tensor, temperature: float, dim: int) -> Tensor:
    ours = F.log_softmax(upcast_half(student) / temperature, dim)
    theirs = F.log_softmax(upcast_half(teacher) / temperature, dim)
    return F.kl_div(ours, theirs, reduction="none", log_target=True)


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """The mean over all (valid) elements; 0, and connected, where there are none."""
    if valid is None:
        return values.sum() / max(1, values.numel())
    return values.where(valid, 0).sum() / valid.sum().clamp(min=1)
