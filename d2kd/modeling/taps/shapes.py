"""What is known of tapped features before training: channels and strides, seen on a blank image, and more."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2kd.distillers import NormAffine, TapInfo
from d2kd.rng import preserve_rng_state

from ..architectures import architecture_of, is_region_tap
from .address import TapError, is_in_backbone, last_norm
from .recording import FeatureTaps, evaluation_mode


def describe_taps(model: nn.Module, names: Sequence[str]) -> dict[str, TapInfo]:
    """Returns channels, strides, meaning and norms of tapped features, and whether a gradient passes them.

    Raises:
        TapError: a tap is unknown, does not fire, fires twice, or is neither a feature map (N, C, H, W) nor a vector
            (R, C) a region or image.
    """
    predictions = {p.tap: p for p in architecture_of(model).predictions()}
    described = {}
    for name, (channels, stride, trainable) in _shapes(model, names).items():
        norm = _norm_before(model, name, channels)
        described[name] = TapInfo(name, channels, stride, predictions.get(name), norm, trainable)
    return described


@torch.enable_grad()
def _shapes(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[int, float, bool]]:
    """Channels and strides (0 for vectors) of tapped features, and whether a gradient passes them."""
    device = next(model.parameters()).device
    side = architecture_of(model).probe_size()
    mean: Tensor | None = getattr(model, "pixel_mean", None)
    channels = 3 if mean is None else mean.numel()  # of images in gray, say
    blank = torch.zeros(channels, side, side, dtype=torch.uint8, device=device)
    widths: list[int] = []
    handle = model.get_submodule("backbone").register_forward_pre_hook(
        lambda module, args: widths.append(args[0].shape[-1])
    )
    taps = FeatureTaps(model, names)
    in_backbone = all(is_in_backbone(model, tap.name) for tap in taps.taps)
    recording = taps.recording(stop_when_done=in_backbone)
    with handle, evaluation_mode(model), preserve_rng_state(device), recording as features:
        model([{"image": blank, "height": side, "width": side}])
    for name, feature in features.items():
        # the image is a square: what is none has its channels elsewhere
        if feature.dim() not in (2, 4) or (feature.dim() == 4 and feature.shape[2] != feature.shape[3]):
            raise TapError(
                f"Tap {name!r} has the shape {tuple(feature.shape)} of a square image; only feature maps (N, C, H, W) "
                "and vectors (R, C) can be distilled."
            )
    shapes = {}
    for tap in taps.taps:
        feature = features[tap.name]
        stride = widths[0] / feature.shape[-1] if feature.dim() == 4 else 0.0
        # heads may run without gradient in evaluation
        trainable = feature.requires_grad or not is_in_backbone(model, tap.name)
        shapes[tap.name] = (feature.shape[1], stride, trainable)
    return shapes


def _norm_before(model: nn.Module, tap: str, channels: int) -> NormAffine | None:
    norm: Any = None if is_region_tap(tap) else last_norm(model, tap)
    if norm is None or norm.running_var.numel() != channels:
        return None
    weight, bias = norm.weight, norm.bias
    if weight is None:  # a norm without scale and shift
        return NormAffine(torch.ones_like(norm.running_var), torch.zeros_like(norm.running_var))
    return NormAffine(weight.detach(), bias.detach())
