"""The focal loss of all anchors of a batch, without targets as large as the predictions."""

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def dense_focal_loss(
    pred_logits: list[torch.Tensor], gt_labels: torch.Tensor, num_classes: int, alpha: float, gamma: float
) -> torch.Tensor:
    """Sum of the sigmoid focal loss (arXiv 1708.02002, equation 5) over all anchors that are not ignored.

    Same value as `fvcore.nn.sigmoid_focal_loss` on one-hot targets. Nearly all entries are background, so one
    formula is applied to all, and the one foreground entry of an anchor replaced. Value and gradient are computed
    together, level by level: neither one-hot targets nor a copy of all levels exist at any time.

    Args:
        pred_logits: (N, R_i, K) of each level.
        gt_labels: (N, R) classes in [0, K); K is background, a negative number is ignored.
        num_classes: K.
        alpha: weight of the foreground, with 1 - alpha for the background; negative for no weights.
        gamma: focusing exponent.

    Returns:
        A float32 scalar.
    """
    assert all(x.shape[-1] == num_classes for x in pred_logits), (
        f"expected logits of {num_classes} classes, got shapes {[list(x.shape) for x in pred_logits]}"
    )
    labels = gt_labels.split([x.shape[1] for x in pred_logits], dim=1)
    levels = [_FocalLossSum.apply(x, y, alpha, gamma) for x, y in zip(pred_logits, labels)]
    return torch.stack(levels).sum()


class _FocalLossSum(torch.autograd.Function):
    """`dense_focal_loss` of one level; keeps nothing but the gradient for the backward pass."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        logits: torch.Tensor,
        labels: torch.Tensor,
        alpha: float,
        gamma: float,
    ) -> torch.Tensor:
        foreground_weight, background_weight = (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)
        x = logits.float()
        num_classes = x.shape[-1]
        loss, grad = _background_term(x, gamma)
        weight = (labels >= 0)[..., None] * background_weight
        loss.mul_(weight)
        grad.mul_(weight)

        # The clamped index keeps gather in range for background and ignored labels, which `foreground` masks out.
        index = labels.clamp(0, num_classes - 1)[..., None]
        foreground = ((labels >= 0) & (labels < num_classes))[..., None]
        # The loss of target 1 is that of target 0 at the negated logit.
        fg_loss, fg_grad = _background_term(-x.gather(-1, index), gamma)
        fg_loss, fg_grad = fg_loss * foreground_weight, fg_grad * -foreground_weight
        loss.scatter_(-1, index, torch.where(foreground, fg_loss, loss.gather(-1, index)))
        grad.scatter_(-1, index, torch.where(foreground, fg_grad, grad.gather(-1, index)))
        # Most gradients are too small for float16 until backward has multiplied them by the loss scale.
        ctx.save_for_backward(grad if logits.dtype == torch.float16 else grad.to(logits.dtype))
        ctx.dtype = logits.dtype
        return loss.sum()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_output: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return (grad * grad_output).to(ctx.dtype), None, None, None


def _background_term(x: torch.Tensor, gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The focal loss -p^gamma log(1 - p), p = sigmoid(x), of target 0, and its derivative."""
    p = x.sigmoid()
    nll = _softplus(x)
    modulation = p.pow(gamma)
    # The derivative is p^gamma (gamma (1 - p) nll + p), from dp/dx = p (1 - p) and dnll/dx = p.
    grad = torch.rsub(p, 1).mul_(nll).mul_(gamma).add_(p).mul_(modulation)
    return nll.mul_(modulation), grad


def _softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(x)); on the CPU of vectorized operators, in a fifth of the time of `F.softplus`."""
    if x.device.type != "cpu":
        return F.softplus(x)
    u = x.abs().neg_().exp_()
    w = u + 1
    rounding = u.sub_(w - 1).div_(w)  # what 1 + u has lost: log(1 + u) = log(w) + (u - (w - 1)) / w
    return w.log_().add_(rounding).add_(x.clamp(min=0))
