"""Groups of teacher channels: reduced to one map each, with margins, and the one-sided error against them."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from d2kd.layers import REDUCTIONS, upcast_half
from d2kd.layers.losses import channel_variance

#: Below this probability of a negative value its expectation is not computed; margin = -3 sigma there.
MIN_PROBABILITY = 1e-3


class Reduced(NamedTuple):
    """What a student channel is compared with: map (N, Cs, H, W) and margin (Cs,)."""

    map: Tensor
    margin: Tensor


#: Draws uniform numbers in [0, 1) of a shape, on the device of a tensor.
Uniform = Callable[[tuple[int, ...], torch.device], Tensor]


def norm_margin(weight: Tensor, bias: Tensor) -> Tensor:
    """Expected value of N(bias, weight^2) given that it is negative: what a channel's ReLU cuts off, on average.

    Heo et al., "A Comprehensive Overhaul of Feature Distillation" (ICCV 2019), eq. 4 and its appendix A.

    Args:
        weight: (C,), scale of the norm before the ReLU; its sign does not matter.
        bias: (C,), shift of that norm.

    Returns:
        (C,) in float64: at most 0; -3 |weight| where a negative value is less likely than 0.001.
    """
    sigma, beta = weight.double().abs(), bias.double()
    sigma = sigma + 1e-12  # a channel that is switched off has sigma = 0; its margin is then min(bias, 0)
    z = beta / sigma
    probability = torch.special.ndtr(-z)
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    expected = beta - sigma * density / probability.clamp(min=MIN_PROBABILITY)
    return torch.where(probability > MIN_PROBABILITY, expected, -3 * sigma)


def reduce_groups(teacher: Tensor, margin: Tensor, assignment: Tensor, reducer: str, uniform: Uniform) -> Reduced:
    """Reduces the group of teacher channels of every student channel to one map.

    Args:
        teacher: (N, Ct, H, W), without gradient.
        margin: (Ct,).
        assignment: (Cs, k), the teacher channels of every student channel.
        reducer: "amp" the signed value of largest magnitude, "amp_signed" the largest value (as the published code
            had it at first), both with the group's mean margin; "sp" the largest value and margin; "rd" a value of a
            random member at every position, and the margin of another random member; "sm" the only member.
        uniform: where "rd" gets its random numbers.
    """
    return REDUCERS[reducer](teacher, margin[assignment], assignment, uniform)


def _largest_magnitude(teacher: Tensor, margins: Tensor, assignment: Tensor, uniform: Uniform) -> Reduced:
    highest = teacher.index_select(1, assignment[:, 0])
    if assignment.shape[1] == 1:
        return Reduced(highest, margins[:, 0])
    lowest = highest.clone()
    # channel by channel: no copy of the whole teacher map, and many times faster than an argmax over channels
    for channels in assignment.t()[1:]:
        values = teacher.index_select(1, channels)
        torch.maximum(highest, values, out=highest)
        torch.minimum(lowest, values, out=lowest)
    magnitude = torch.maximum(highest, lowest.neg_())
    # with the sign of their sum; `torch.where` takes seven times as long on the CPU
    return Reduced(magnitude.copysign_(highest.sub_(lowest)), margins.mean(dim=1))


def _largest(teacher: Tensor, assignment: Tensor) -> Tensor:
    highest = teacher.index_select(1, assignment[:, 0])
    for channels in assignment.t()[1:]:
        torch.maximum(highest, teacher.index_select(1, channels), out=highest)
    return highest


def _random(teacher: Tensor, margins: Tensor, assignment: Tensor, uniform: Uniform) -> Reduced:
    n, _, h, w = teacher.shape
    cs, k = assignment.shape
    pick = (uniform((n, cs, h, w), teacher.device) * k).long()
    pick_margin = (uniform((cs,), teacher.device) * k).long()
    return gather_assigned(teacher, margins, assignment, pick, pick_margin)


def gather_assigned(teacher: Tensor, margins: Tensor, assignment: Tensor, pick: Tensor, pick_margin: Tensor) -> Reduced:
    """The values of chosen channels: `pick` (N, Cs, H, W) and `pick_margin` (Cs,) count within a group, 0 to k - 1."""
    reduced = teacher.index_select(1, assignment[:, 0])
    for number, channels in enumerate(assignment.t()[1:], start=1):
        reduced = torch.where(pick == number, teacher.index_select(1, channels), reduced)
    return Reduced(reduced, margins.gather(1, pick_margin[:, None]).squeeze(1))


REDUCERS: dict[str, Callable[[Tensor, Tensor, Tensor, Uniform], Reduced]] = {
    "amp": _largest_magnitude,
    "amp_signed": lambda teacher, margins, assignment, uniform: Reduced(
        _largest(teacher, assignment), margins.mean(dim=1)
    ),
    "sp": lambda teacher, margins, assignment, uniform: Reduced(_largest(teacher, assignment), margins.amax(dim=1)),
    "rd": _random,
    "sm": lambda teacher, margins, assignment, uniform: Reduced(
        teacher.index_select(1, assignment[:, 0]), margins[:, 0]
    ),
}


def scale_to_unit(reduced: Reduced, eps: float = 1e-6) -> Reduced:
    """Divides every channel and its margin by the channel's standard deviation over batch and space, the map in place.

    Nothing is centered: zero is where the ReLU cuts, and has to stay there.
    """
    target = upcast_half(reduced.map)
    scale = torch.rsqrt(channel_variance(target) + eps)
    return Reduced(target.mul_(scale[:, None, None]), reduced.margin.to(scale.dtype) * scale)


def one_sided_error(student: Tensor, reduced: Reduced, reduction: str) -> Tensor:
    """Squared error that lets a student stay below a target that is not positive: the ReLU behind cuts both off.

    With t' = max(t, margin) the sum runs over the elements where s > t' or t' > 0 ("partial L2" of Heo et al., ICCV
    2019, eq. 3).

    Args:
        student: (N, Cs, H, W).
        reduced: target and margin, without gradient.
        reduction: "batchmean" or "mean", see `squared_error`.

    Returns:
        A scalar in float32 or more.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}.")
    target = upcast_half(reduced.map.detach())
    error: Tensor = _OneSidedError.apply(upcast_half(student), target, reduced.margin.to(target.dtype))
    return error * student.shape[1:].numel() if reduction == "batchmean" else error


class _OneSidedError(torch.autograd.Function):
    """The mean over all elements; one map is kept, and becomes the gradient."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, target: Tensor, margin: Tensor) -> Tensor:
        target = torch.maximum(target, margin[:, None, None])
        difference = student - target
        # below a target that is not positive nothing is to be learned; as bounds, not a mask, it takes half of the time
        lowest = target.gt_(0).mul_(torch.finfo(target.dtype).min)
        torch.maximum(difference, lowest, out=difference)
        ctx.save_for_backward(difference)
        return torch.mul(difference, difference, out=lowest).sum() / max(1, difference.numel())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return difference * (2 / max(1, difference.numel()) * gradient), None, None
