"""Addresses of taps: which module, and which part of its output, "res4.pre_relu" or "head.bbox_pred@2" means."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from d2kd.errors import UserError, did_you_mean

from ..architectures import architecture_of, output_shapes

PRE_RELU = ".pre_relu"
PRE_NORM = ".pre_norm"


class TapError(UserError):
    """A tap that the model does not have, or that did not give one tensor in a forward pass."""


class Tap(NamedTuple):
    """An address, resolved: the module to hook, and what to take from its output."""

    name: str
    module: nn.Module
    # entry of a dict output, None for the output itself
    key: str | None = None
    # which call of the module in one forward pass, None where there must be one call only
    call: int | None = None
    # tap the input of the module's last ReLU, or other activation, instead of the module's output
    pre_relu: bool = False
    # tap what goes into the module, which is the norm of a convolution
    pre_norm: bool = False
    # the module gives (N, H, W, C); the tap is (N, C, H, W)
    channels_last: bool = False
    # the module gives tokens (N, L, C), so many before those of the patches, which lie on a square grid
    prefix_tokens: int | None = None
    # what follows gets a copy: it writes over it, like the ReLU and the sum in Detectron2's blocks
    copied: bool = False


def resolve_tap(model: nn.Module, name: str) -> Tap:
    """Finds what a tap's address means in a model.

    Addresses: "p3" (an output of the backbone), "res4" (a stage of the bottom-up network, also one that is no output),
    "res4.pre_relu" (the same before its last ReLU or other activation; also of one block), "fpn_output3.pre_norm" (what
    a convolution of Detectron2 gives to its norm), "head.bbox_pred" (the output of any module), "head.bbox_pred@2" (its
    third call in a forward pass, counted from 0), "blocks.3" (a block of a vision transformer, as a map (N, C, H, W)).

    Raises:
        TapError: there is no such feature; the message lists near matches.
    """
    address, _, call = name.partition("@")
    if call and not call.isdigit():
        raise TapError(f"Tap {name!r}: what follows '@' is the number of the call, e.g. '{address}@0'.")
    address, pre_relu = address.removesuffix(PRE_RELU), address.endswith(PRE_RELU)
    named = dict(model.named_modules())
    if pre_relu:
        return Tap(name, _last_block(name, _find_stage(model, name, address, named)), pre_relu=True)
    if address.endswith(PRE_NORM):
        norm = _norm_of(name, _find_stage(model, name, address.removesuffix(PRE_NORM), named))
        return Tap(name, norm, call=int(call) if call else None, pre_norm=True)
    for path in dict.fromkeys(("backbone", architecture_of(model).bottom_up)):
        # a stage that is a module of its own is hooked itself: it fires before the rest of the backbone runs
        if address in _outputs(named.get(path)) and f"{path}.{address}" not in named:
            return Tap(name, named[path], key=address)
    module = _find_stage(model, name, address, named)
    architecture = architecture_of(model)
    return Tap(
        name,
        module,
        call=int(call) if call else None,
        channels_last=architecture.is_channels_last(module),
        prefix_tokens=architecture.prefix_tokens(module),
        copied=_is_layer_of(named.get(architecture.bottom_up), module),
    )


def last_norm(model: nn.Module, name: str) -> nn.Module | None:
    """Returns the batch norm, frozen or not, that ends the block before a tap (never a shortcut's); else None."""
    tap = resolve_tap(model, name)
    if tap.key is not None or tap.pre_norm:
        return None
    norms = [
        module
        for path, module in tap.module.named_modules()
        if getattr(module, "running_var", None) is not None and not {"shortcut", "downsample"} & set(path.split("."))
    ]
    return norms[-1] if norms else None


def tap_names(model: nn.Module) -> list[str]:
    """Returns the short addresses of a model: outputs and stages of its backbone, finest first."""
    named = dict(model.named_modules())
    names = list(_outputs(named.get("backbone")))
    for path in (architecture_of(model).bottom_up, "backbone"):
        part = named.get(path)
        names += [n for n in _outputs(part) if n not in names]
        names += [n for n in getattr(part, "stage_names", ()) if n not in names]
    return names


def is_in_backbone(model: nn.Module, name: str) -> bool:
    """Returns whether a tap lies in the backbone, neck included."""
    tapped = resolve_tap(model, name).module
    return any(module is tapped for module in model.get_submodule("backbone").modules())


def _is_layer_of(network: nn.Module | None, module: nn.Module) -> bool:
    """Whether a module is a single layer of a network, with its norm if it has one."""
    if network is None or any(name != "norm" for name, _ in module.named_children()):
        return False
    return any(layer is module for layer in network.modules())


def _outputs(module: nn.Module | None) -> Sequence[str]:
    return tuple(output_shapes(module))


def _find_stage(model: nn.Module, name: str, address: str, named: dict[str, nn.Module]) -> nn.Module:
    bottom_up = architecture_of(model).bottom_up
    for path in (bottom_up, "backbone"):  # networks of other libraries tell their stages
        stage_module: Any = getattr(named.get(path), "stage_module", None)
        stage = None if stage_module is None else stage_module(address)
        if stage is not None:
            return stage
    for path in (f"{bottom_up}.{address}", f"{bottom_up}.net.{address}", f"backbone.{address}", address):
        if path in named and path:
            return named[path]
    hint = did_you_mean(address, [*tap_names(model), *filter(None, named)])
    raise TapError(
        f"Tap {name!r} is not in the {type(model).__name__}.{hint} Features of its backbone: "
        f"{', '.join(tap_names(model))}; any module path (e.g. 'head.bbox_pred') is a tap too."
    )


def _norm_of(name: str, convolution: nn.Module) -> nn.Module:
    norm = getattr(convolution, "norm", None)
    if isinstance(norm, nn.Module):
        return norm
    raise TapError(
        f"Tap {name!r}: {PRE_NORM!r} needs a convolution with a norm; this {type(convolution).__name__} has none."
    )


def _last_block(name: str, stage: nn.Module) -> nn.Module:
    blocks = list(stage.children())
    if isinstance(stage, nn.Sequential) and blocks:
        return blocks[-1]
    if blocks:
        return stage
    raise TapError(f"Tap {name!r}: '{PRE_RELU}' needs a stage of blocks, but this is a {type(stage).__name__}.")
