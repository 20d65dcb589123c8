"""Taps: features of any Detectron2 model by address, read (or replaced) with removable hooks, the model unedited."""

import contextlib
import difflib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from detectron2.modeling.backbone.vit import ViT

PRE_RELU = ".pre_relu"
#: Where a backbone with a pyramid keeps its body: FPN, and ViTDet's simple feature pyramid.
_BODIES = ("backbone.bottom_up", "backbone.net")
_RELUS = {torch.relu, torch.relu_, torch.nn.functional.relu, torch.nn.functional.relu_, Tensor.relu, Tensor.relu_}


class TapError(ValueError):
    """A tap that the model does not have, or that did not give one tensor in a forward pass."""


class Tap(NamedTuple):
    """An address, resolved: the module to hook, and what to take from its output."""

    name: str
    module: nn.Module
    # entry of a dict output, None for the output itself
    key: str | None = None
    # which call of the module in one forward pass, None where there must be one call only
    call: int | None = None
    # take what goes into the last ReLU of the module instead of what comes out
    pre_relu: bool = False
    # the module gives (N, H, W, C), as the blocks of a vision transformer do; the tap is (N, C, H, W)
    channels_last: bool = False


def resolve_tap(model: nn.Module, name: str) -> Tap:
    """Finds what a tap's address means in a model.

    Addresses: "p3" (an output of the backbone), "res4" (a stage of the bottom-up network, also one that is no output),
    "res4.pre_relu" (the same before its last ReLU), "head.bbox_pred" (the output of any module), "head.bbox_pred@2"
    (its third call in a forward pass, counted from 0), "blocks.3" (a block of a vision transformer, as a map (N, C, H,
    W)).

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
    for path in ("backbone", *_BODIES):
        # a stage that is a module of its own is hooked itself: it fires before the rest of the backbone runs
        if address in _outputs(named.get(path)) and f"{path}.{address}" not in named:
            return Tap(name, named[path], key=address)
    module = _find_stage(model, name, address, named)
    return Tap(name, module, call=int(call) if call else None, channels_last=_is_transformer_block(module, named))


def last_norm(model: nn.Module, name: str) -> nn.Module | None:
    """The batch norm, frozen or not, that ends the block before a tap (never a shortcut's); None if there is none."""
    tap = resolve_tap(model, name)
    if tap.key is not None:
        return None
    norms = [
        module
        for path, module in tap.module.named_modules()
        if getattr(module, "running_var", None) is not None and not {"shortcut", "downsample"} & set(path.split("."))
    ]
    return norms[-1] if norms else None


def tap_names(model: nn.Module) -> list[str]:
    """The short addresses of a model: outputs and stages of its backbone, finest first."""
    named = dict(model.named_modules())
    names = list(_outputs(named.get("backbone")))
    for path in (*_BODIES, "backbone"):
        body = named.get(path)
        names += [n for n in _outputs(body) if n not in names]
        names += [n for n in getattr(body, "stage_names", ()) if n not in names]
    return names


def is_in_backbone(model: nn.Module, name: str) -> bool:
    """Whether a tap is one of `tap_names`, or a part of such a feature."""
    return name.partition(".")[0] in tap_names(model)


def _outputs(module: nn.Module | None) -> Sequence[str]:
    return tuple(module.output_shape()) if hasattr(module, "output_shape") else ()


def _find_stage(model: nn.Module, name: str, address: str, named: dict[str, nn.Module]) -> nn.Module:
    for path in (*(f"{body}.{address}" for body in _BODIES), f"backbone.{address}", address):
        if path in named and path:
            return named[path]
    choices = tap_names(model) + [n for n in named if n]
    near = difflib.get_close_matches(address, choices, n=3, cutoff=0.5)
    hint = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
    raise TapError(
        f"Tap {name!r} is not in the {type(model).__name__}.{hint} Features of its backbone: "
        f"{', '.join(tap_names(model))}; any module path (e.g. 'head.bbox_pred') is a tap too."
    )


def _is_transformer_block(module: nn.Module, named: dict[str, nn.Module]) -> bool:
    return any(module is block for body in named.values() if isinstance(body, ViT) for block in body.blocks)


def _last_block(name: str, stage: nn.Module) -> nn.Module:
    blocks = list(stage.children())
    if isinstance(stage, nn.Sequential) and blocks:
        return blocks[-1]
    if blocks:
        return stage
    raise TapError(f"Tap {name!r}: '{PRE_RELU}' needs a stage of blocks, but this is a {type(stage).__name__}.")


class _LastReluInput(TorchFunctionMode):
    """While active, runs every ReLU out of place and remembers what went into the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | None = None
        self.result: Tensor | None = None

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _RELUS:
            self.value = args[0]
            self.result = torch.relu(args[0])
            return self.result
        return func(*args, **(kwargs or {}))


class _AllTapsFired(Exception):
    """Ends a forward pass that has nothing more to give."""


class FeatureTaps:
    """Reads, or replaces, a fixed set of taps of one model.

    >>> taps = FeatureTaps(model, ["p3", "p4"])
    >>> with taps.recording() as features:
    ...     model(batched_inputs)
    >>> features["p3"]

    Hooks exist only inside the block, nothing is stored on the model, and the tensors keep their autograd graph.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        """
        Raises:
            TapError: the model has no such feature.
        """
        self.taps = [resolve_tap(model, name) for name in dict.fromkeys(names)]

    @contextlib.contextmanager
    def recording(self, stop_when_done: bool = False) -> Iterator[dict[str, Tensor]]:
        """Yields a dict that the forward passes inside fill: tap name to tensor.

        Args:
            stop_when_done: end the forward pass inside the block as soon as every tap has fired.

        Raises:
            TapError: at the end of the block, for a tap that did not fire; when it happens, for a tap that fires twice
                or gives no tensor.
        """
        features: dict[str, Tensor] = {}
        with self._attached(_Recorder(features, len(self.taps) if stop_when_done else None)):
            yield features

    @contextlib.contextmanager
    def _attached(self, recorder: "_Recorder") -> Iterator[None]:
        try:
            for tap in self.taps:
                recorder.attach(tap)
            yield
        except _AllTapsFired:
            pass
        finally:
            recorder.detach()
        missing = [tap.name for tap in self.taps if tap.name not in recorder.features]
        if missing:
            raise TapError(
                f"Taps that did not fire in the forward pass: {', '.join(missing)}. The model does not run them in "
                "this mode."
            )

    @contextlib.contextmanager
    def replacing(self, replace: Callable[[str, Tensor], Tensor]) -> Iterator[dict[str, Tensor]]:
        """Like `recording`, but what the model computes with behind each tap is `replace(name, feature)`.

        Yields:
            The features as they were before they were replaced, by tap name.

        Raises:
            TapError: as in `recording`; and for a ".pre_relu" whose block does not end with that ReLU.
        """
        features: dict[str, Tensor] = {}
        with self._attached(_Recorder(features, None, replace)):
            yield features


class _Recorder:
    """The hooks of one recording."""

    def __init__(
        self,
        features: dict[str, Tensor],
        stop_after: int | None,
        replace: Callable[[str, Tensor], Tensor] | None = None,
    ) -> None:
        self.features = features
        self.stop_after = stop_after
        self.replace = replace
        self.handles: list[Any] = []
        self.modes: list[_LastReluInput] = []

    def attach(self, tap: Tap) -> None:
        if tap.pre_relu:
            self.handles.append(tap.module.register_forward_pre_hook(self._enter_block))
            self.handles.append(tap.module.register_forward_hook(self._leave_block(tap)))
        else:
            self.handles.append(tap.module.register_forward_hook(self._take_output(tap)))

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        while self.modes:  # an exception inside a block left its mode behind
            self.modes.pop().__exit__(None, None, None)

    def _enter_block(self, module: nn.Module, args: tuple) -> None:
        mode = _LastReluInput()
        mode.__enter__()
        self.modes.append(mode)

    def _leave_block(self, tap: Tap) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> Tensor | None:
            mode = self.modes.pop()
            mode.__exit__(None, None, None)
            if mode.value is None:
                raise TapError(
                    f"Tap {tap.name!r}: no ReLU runs in the last block ({type(module).__name__}) of that stage."
                )
            self._store(tap, mode.value)
            if self.replace is None:
                return None
            if mode.result is not output:
                raise TapError(
                    f"Tap {tap.name!r} cannot be replaced: the last ReLU of its block ({type(module).__name__}) does "
                    "not give the block's output. Use the tap of the stage itself."
                )
            return torch.relu(self.replace(tap.name, mode.value))

        return hook

    def _take_output(self, tap: Tap) -> Callable:
        calls = 0

        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            nonlocal calls
            calls += 1
            if tap.call is not None and tap.call != calls - 1:
                return None
            value = output if tap.key is None else output[tap.key]
            value = value.permute(0, 3, 1, 2) if tap.channels_last else value
            self._store(tap, value)
            return None if self.replace is None else _put(tap, output, self.replace(tap.name, value))

        return hook

    def _store(self, tap: Tap, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise TapError(f"Tap {tap.name!r} gives a {type(value).__name__}, not a tensor: name a module inside it.")
        if tap.name in self.features:
            raise TapError(
                f"Tap {tap.name!r} fires more than once in a forward pass: choose a call, e.g. '{tap.name}@0'."
            )
        self.features[tap.name] = value
        if self.stop_after == len(self.features):
            raise _AllTapsFired


def _put(tap: Tap, output: Any, value: Tensor) -> Any:
    """The output of the tap's module with another value at the tap."""
    value = value.permute(0, 2, 3, 1) if tap.channels_last else value
    return value if tap.key is None else {**output, tap.key: value}
