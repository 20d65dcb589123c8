#!/usr/bin/env python
"""Time and memory of the ReceptiveTokens loss of one level, against the literal form with [N, T, C, H, W] tensors.

    python benchmarks/receptive_tokens.py

Forward and backward of one level, weighted and customized. The literal form multiplies both maps with every mask, and
runs the weighting branch's 3x3 convolution; it is written here as the method is defined. Both are measured twice: on
the maps as they are, as in the paper, and as the default has it, with a learned 1x1 aligner from half the channels and
standardized maps, which cost the same on both sides. Transient memory is the peak of what is allocated on top of the
two maps and the student's gradient, which any form needs.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import timed, transient_mib
from torch import Tensor

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.distillers import ReceptiveTokens, TapInfo, TapPair
from d2kd.distillers.receptive_tokens.tokens import Tokens, WeightingBranch
from d2kd.layers import normalize


def literal_weights(teacher: Tensor, branch: WeightingBranch) -> Tensor:
    """(N, T) by the two convolutions."""
    pooled = branch.conv(teacher).mean((2, 3), keepdim=True)
    return branch.predictor(pooled).flatten(1).softmax(1)


def literal_masks(x: Tensor, tokens: Tensor) -> Tensor:
    """(N, T, 1, H, W)."""
    return torch.einsum("tc,nchw->nthw", tokens, x).sigmoid()[:, :, None]


def literal_loss(student: Tensor, teacher: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    """The loss as it is defined: masked maps, their squared difference, per token and channel."""
    with torch.no_grad():
        masks = literal_masks(teacher, tokens) * literal_masks(student, tokens)
    difference = F.mse_loss(student[:, None] * masks, teacher[:, None] * masks, reduction="none")
    per_channel = difference.sum((3, 4)) / masks.sum((3, 4))
    return (per_channel.mean(2) * weights).sum(1).mean()


def measure(loss: Callable[[], Tensor], student: Tensor, device: str, repeats: int) -> dict[str, float]:
    """Median seconds of forward and backward, transient MiB, and the value."""

    def step() -> None:
        student.grad = None
        loss().backward()

    step()
    seconds = statistics.median(timed(step, device) for _ in range(repeats))
    student.grad = None
    gradient_mib = student.numel() * student.element_size() / 2**20
    return {"seconds": seconds, "transient_mib": transient_mib(step, device) - gradient_mib, "loss": loss().item()}


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 2), ("channels", 256), ("tokens", 6), ("height", 100), ("width", 152)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape = args.images, args.channels, args.height, args.width
    student = torch.randn(shape, device=args.device, requires_grad=True)
    teacher = torch.randn(shape, device=args.device)
    tokens = torch.randn(args.tokens, args.channels) / args.channels**0.5
    branch = WeightingBranch(args.channels, args.tokens).requires_grad_(False)
    pair = TapPair(*[TapInfo("p3", args.channels, 8.0)] * 2)
    published = {"weight": 1.0, "normalize": "none", "position_weights": "mask_sum", "warmup_iters": 0}
    method = ReceptiveTokens(pairs=[pair], tokens=[Tokens(tokens, *branch.folded())], **published).to(args.device)
    tokens, branch = tokens.to(args.device), branch.to(args.device)
    fixed = literal_weights(teacher, branch)
    forms: dict[str, Callable[[], Tensor]] = {
        "literal": lambda: literal_loss(student, teacher, tokens, literal_weights(teacher, branch)),
        "literal_without_weighting_branch": lambda: literal_loss(student, teacher, tokens, fixed),
        "d2kd": lambda: method({"p3": student}, {"p3": teacher})["p3"],
    }
    result: dict[str, Any] = {n: measure(loss, student, args.device, args.repeats) for n, loss in forms.items()}
    narrow = torch.randn(args.images, args.channels // 2, args.height, args.width, device=args.device).requires_grad_()
    aligned = TapPair(TapInfo("p3", args.channels // 2, 8.0), TapInfo("p3", args.channels, 8.0))
    usual = ReceptiveTokens(pairs=[aligned], tokens=[Tokens(tokens.cpu(), *branch.cpu().folded())], warmup_iters=0)
    usual, branch = usual.to(args.device), branch.to(args.device)
    default: dict[str, Callable[[], Tensor]] = {
        "literal_default": lambda: literal_loss(
            normalize(usual.align[0](narrow), "standardize"),
            normalize(teacher, "standardize"),
            tokens,
            literal_weights(teacher, branch),
        ),
        "d2kd_default": lambda: usual({"p3": narrow}, {"p3": teacher})["p3"],
    }
    result |= {n: measure(loss, narrow, args.device, args.repeats) for n, loss in default.items()}
    for name in ("literal", "literal_without_weighting_branch", "literal_default"):
        ours = result["d2kd_default" if name.endswith("default") else "d2kd"]
        result[f"speed_up_over_{name}"] = result[name]["seconds"] / ours["seconds"]
        result[f"memory_share_of_{name}"] = ours["transient_mib"] / result[name]["transient_mib"]
    print(json.dumps({**vars(args), **result}, indent=2))


if __name__ == "__main__":
    main()
