"""The squared error of two feature maps, which may be standardized first: the loss of most feature methods."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Values of NORMALIZE, in every method that has the key.
NORMALIZATIONS = ("none", "standardize")
#: Added to a channel's variance.
EPS = 1e-6
#: Values of REDUCTION, in every method that has the key.
REDUCTIONS = ("batchmean", "mean")


def squared_error(prediction: Tensor, target: Tensor, reduction: str, valid: Tensor | None = None) -> Tensor:
    """Returns the squared error of two maps, accumulated in float32 or more.

    Args:
        prediction: (N, C, H, W).
        target: (N, C, H, W), takes no gradient.
        reduction: "batchmean" sums over channels and positions and divides by the N images of this process
            (Yang et al., "Masked Generative Distillation", 2022, eq. 3), so its scale grows with C*H*W;
            "mean" is the mean over all elements.
        valid: (N, H, W), True where the target is known; the mean is then over these positions, and "batchmean" is
            that mean times C*H*W, so that the loss has the same scale however many positions there are.

    Returns:
        A scalar; 0, and connected to the prediction, where no position is valid.

    Raises:
        ValueError: unknown reduction.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}.")
    prediction, target = upcast_half(prediction), upcast_half(target)
    n, c, h, w = prediction.shape
    if valid is not None:
        squares = (prediction - target).square().sum(1)
        total = squares.where(valid, 0).sum() / (c * valid.sum().clamp(min=1))
        return total * (c * h * w) if reduction == "batchmean" else total
    if reduction == "batchmean":
        return F.mse_loss(prediction, target, reduction="sum") / n
    return F.mse_loss(prediction, target)


def standardize(x: Tensor, valid: Tensor | None = None) -> Tensor:
    """Brings every channel to zero mean and unit variance over the batch and all (valid) positions.

    The mean squared difference of two standardized maps is 2 - 2r, r their Pearson correlation (Cao et al., "PKD",
    NeurIPS 2022, eq. 4): it does not see scale and offset of a channel, so one loss weight fits all models.

    Args:
        x: (N, C, H, W), any floating type.
        valid: (N, H, W), True at the positions that count; None is everywhere.

    Returns:
        (N, C, H, W) in float32 or more; constant channels become zero. The gradient flows through the statistics.
    """
    centered, _, variance = _centered(upcast_half(x), valid)
    # sqrt has an infinite slope at 0: a channel that is constant (a 1x1 map of one image) would give NaN gradients
    return centered * torch.rsqrt(variance + EPS)[:, None, None]


def standardized_error(student: Tensor, teacher: Tensor, reduction: str) -> Tensor:
    """Returns `squared_error(standardize(student), standardize(teacher), reduction)`, its gradient computed at once.

    Of a channel with variances v_s and v_t, EPS e, and the covariance c of both maps, the mean error is
    v_s / (v_s + e) + v_t / (v_t + e) - 2 c / sqrt((v_s + e) (v_t + e)), which is 2 - 2r but for e (Cao et al., "PKD",
    NeurIPS 2022, equation 5). Its gradient is a sum of both maps without their means, each times a number of the
    channel: one map is kept for the backward pass instead of five.

    Args:
        student: (N, C, H, W), any floating type.
        teacher: (N, C, H, W), takes no gradient.
        reduction: see `squared_error`.

    Returns:
        A scalar in float32 or more. Its gradient cannot be differentiated again.

    Raises:
        ValueError: unknown reduction.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}.")
    error: Tensor = _StandardizedError.apply(upcast_half(student), upcast_half(teacher.detach()))
    return error * student[0].numel() if reduction == "batchmean" else error


class _StandardizedError(torch.autograd.Function):
    """The mean over all elements."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        (s, _, variance), (t, _, teacher_variance) = _centered(student), _centered(teacher)
        channels, positions = len(variance), s.numel() // len(variance)
        # a product and a sum, whose pairwise additions keep the digits that a product of matrices loses
        covariance = (s * t).mean((0, 2, 3))
        inverse, teacher_inverse = torch.rsqrt(variance + EPS), torch.rsqrt(teacher_variance + EPS)
        both = inverse * teacher_inverse
        error = variance * inverse.square() + teacher_variance * teacher_inverse.square() - 2 * both * covariance
        scale = 2 / (channels * positions)
        own = scale * inverse.square() * (EPS * inverse.square() + both * covariance)
        gradient = s.mul_(own[:, None, None]).addcmul_(t, (scale * both)[:, None, None], value=-1)
        ctx.save_for_backward(gradient)
        return error.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (of_student,) = ctx.saved_tensors
        return of_student * gradient, None


class CenteredMap(NamedTuple):
    """A map whose channels have zero mean over batch and positions, and what was taken away."""

    map: Tensor  # (N, C, H, W) in float32 or more
    mean: Tensor  # (C,)
    variance: Tensor  # (C,), biased

    @property
    def inverse(self) -> Tensor:
        """(C,), what the map is multiplied with to be standardized."""
        return torch.rsqrt(self.variance + EPS)


@torch.no_grad()
def center(x: Tensor, valid: Tensor | None = None) -> CenteredMap:
    """Returns a map of any floating type (N, C, H, W) without its channels' means over (valid) positions.

    Args:
        x: (N, C, H, W).
        valid: (N, H, W), True at the positions that count; None is everywhere.
    """
    return CenteredMap(*_centered(upcast_half(x), valid))


def channel_variance(x: Tensor) -> Tensor:
    """Returns the biased variance (C,) of each channel of a map (N, C, H, W), float32 or more, without gradient."""
    with torch.no_grad():
        return (x - x.mean((0, 2, 3))[:, None, None]).square_().mean((0, 2, 3))


def _centered(x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The map without the mean of each channel, that mean, and the variance.

    Mean and squares take a seventh of the time of `torch.var_mean` over these dimensions on the CPU.
    """
    if valid is None:
        mean = x.mean((0, 2, 3))
        centered = x - mean[:, None, None]
        return centered, mean, (centered * centered).mean((0, 2, 3))
    weights = valid[:, None].to(x.dtype) / valid.sum().clamp(min=1)
    mean = (x * weights).sum((0, 2, 3))
    centered = x - mean[:, None, None]
    return centered, mean, (centered.square() * weights).sum((0, 2, 3))


def normalize(x: Tensor, mode: str, valid: Tensor | None = None) -> Tensor:
    """Applies a value of NORMALIZE, "none" or "standardize".

    Raises:
        ValueError: unknown mode.
    """
    if mode not in NORMALIZATIONS:
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(NORMALIZATIONS)}.")
    return standardize(x, valid) if mode == "standardize" else x


def upcast_half(x: Tensor) -> Tensor:
    """Returns float32 for half-precision types, else the tensor itself: sums over a map need the digits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
