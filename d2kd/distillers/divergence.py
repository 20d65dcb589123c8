"""Divergences between the predictions of two classifiers, softened by a temperature."""

import torch.nn.functional as F
from torch import Tensor

from d2kd.layers import upcast_half


def softmax_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(t/T) || softmax(s/T)) over the classes (Hinton et al., arXiv 1503.02531, section 2).

    T^2 keeps the gradient's size when T changes.

    Args:
        student: logits (N, K) or (N, K, H, W).
        teacher: the same shape, takes no gradient.
        temperature: T, above 0.

    Returns:
        A scalar: the mean over rows (and positions); 0, and connected to the student, where there are none.
    """
    total = _categorical(student, teacher, temperature, dim=1)
    return temperature**2 * total / max(1, student.numel() // student.shape[1])


def spatial_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax_hw(t/T) || softmax_hw(s/T)): each class is a distribution over positions.

    Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction" (ICCV 2021), averaged over images and classes
    as in the segmentation recipes of Yang et al., "Masked Generative Distillation" (2022).

    Args:
        student: logits (N, K, H, W).
        teacher: the same shape, takes no gradient.
        temperature: T, above 0.

    Returns:
        A scalar.
    """
    total = _categorical(student.flatten(2), teacher.flatten(2), temperature, dim=2)
    return temperature**2 * total / max(1, student.shape[0] * student.shape[1])


def binary_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(sigmoid(t/T) || sigmoid(s/T)) of independent binary classifiers, summed.

    Args:
        student: logits of any shape.
        teacher: the same shape, takes no gradient.
        temperature: T, above 0.

    Returns:
        A scalar; 0, and connected to the student, for tensors without elements.
    """
    student, teacher = upcast_half(student) / temperature, upcast_half(teacher) / temperature
    target = teacher.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(student, target, reduction="sum")
    entropy = F.binary_cross_entropy_with_logits(teacher, target, reduction="sum")
    return temperature**2 * (cross_entropy - entropy)


def hard_label_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross entropy of the student to the teacher's most probable class ("hard" distillation, arXiv 2012.12877, eq. 3).

    Args:
        student: logits (N, K) or (N, K, H, W).
        teacher: the same shape, takes no gradient.
        temperature: has no effect.

    Returns:
        A scalar: the mean over rows (and positions); 0, and connected to the student, where there are none.
    """
    if not student.numel():
        return student.sum()
    return F.cross_entropy(upcast_half(student), teacher.argmax(1))


def soft_count(logits: Tensor) -> Tensor:
    """Returns a soft count of positives: the sum of squared probabilities of binary classifiers, a scalar.

    Confident ones count as 1, and the many small ones of the background hardly at all.
    """
    return upcast_half(logits).sigmoid().square().sum()


def _categorical(student: Tensor, teacher: Tensor, temperature: float, dim: int) -> Tensor:
    ours = F.log_softmax(upcast_half(student) / temperature, dim)
    theirs = F.log_softmax(upcast_half(teacher) / temperature, dim)
    return F.kl_div(ours, theirs, reduction="sum", log_target=True)
