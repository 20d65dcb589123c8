"""Reads, or replaces, tapped features with removable hooks; the model is not edited."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.models.shufflenetv2 import InvertedResidual

from detectron2.layers import CycleBatchNormList

from .address import Tap, TapError, resolve_tap

_RELUS = {torch.relu, torch.relu_, F.relu, F.relu_, Tensor.relu, Tensor.relu_}
#: Others that end the blocks of networks; these take `inplace`, or are never in place.
_ACTIVATIONS = {F.relu6, F.hardtanh, F.hardswish, F.silu, F.gelu, F.leaky_relu, F.elu, F.mish}


class _LastReluInput(TorchFunctionMode):
    """While active, runs every ReLU (or other activation) out of place and remembers what went into the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | None = None
        self.result: Tensor | None = None
        #: `value` is a map (N, H, W, C), as linear layers give it
        self.channels_last = False
        self.linear: Tensor | None = None
        #: the last activation, as a function of its input
        self.activation: Callable[[Tensor], Tensor] = torch.relu

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _RELUS:
            self.activation = torch.relu
        elif func in _ACTIVATIONS:
            rest = {**kwargs, "inplace": False} if "inplace" in kwargs else kwargs
            self.activation = lambda x: func(x, *args[1:], **rest)
        else:
            result = func(*args, **kwargs)
            self.linear = result if func is F.linear else self.linear
            return result
        self.value = args[0]
        self.channels_last = self.linear is not None and args[0] is self.linear and self.linear.dim() == 4
        self.result = self.activation(args[0])
        return self.result

    def start(self) -> None:
        """Watches from here on, as entering a `with` would, which a pair of hooks cannot."""
        TorchFunctionMode.__enter__(self)

    def stop(self) -> None:
        """Watches no longer."""
        TorchFunctionMode.__exit__(self, None, None, None)


class _AllTapsFired(Exception):
    """Aborts the forward pass once all taps have fired."""


class FeatureTaps:
    """Reads, or replaces, a fixed set of taps of one model.

    >>> taps = FeatureTaps(model, ["p3", "p4"])
    >>> with taps.recording() as features:
    ...     model(batched_inputs)
    >>> features["p3"]

    Hooks exist only inside the block, nothing is stored on the model, and the tensors keep their autograd graph. A part
    of the model that must run otherwise for it (in one pass, or with layers that predictions do not need) has a method
    `while_tapped(modules)`: a context around the block, called with the tapped modules.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        """
        Raises:
            TapError: the model has no such feature.
        """
        self.taps = [resolve_tap(model, name) for name in dict.fromkeys(names)]
        contexts: list[Any] = [getattr(module, "while_tapped", None) for module in model.modules()]
        self._contexts = [context for context in contexts if context is not None]
        self._cycles = [module for module in model.modules() if isinstance(module, CycleBatchNormList)]

    @contextlib.contextmanager
    def recording(self, stop_when_done: bool = False) -> Iterator[dict[str, Tensor]]:
        """Yields a dict that the forward pass inside fills: tap name to tensor.

        Args:
            stop_when_done: end the forward pass inside the block as soon as every tap has fired, unless norms that take
                turns (`CycleBatchNormList`) have begun one: they would go on with another one's in the next pass.

        Raises:
            TapError: at the end of the block, for a tap that did not fire; when it happens, for a tap that fires twice
                or gives no tensor.
        """
        features: dict[str, Tensor] = {}
        with self._attached(_Recorder(features, len(self.taps) if stop_when_done else None)):
            yield features

    @contextlib.contextmanager
    def _attached(self, recorder: "_Recorder") -> Iterator[None]:
        modules = [tap.module for tap in self.taps]
        with contextlib.ExitStack() as around:
            for context in self._contexts:
                around.enter_context(context(modules))
            try:
                for tap in self.taps:
                    recorder.attach(tap)
                for module in self._cycles:
                    recorder.watch_turns(module)
                yield
            except _AllTapsFired:
                pass
            finally:
                recorder.detach()
        recorder.check()
        missing = [tap.name for tap in self.taps if tap.name not in recorder.features]
        if missing:
            raise TapError(
                f"Taps that did not fire in the forward pass: {', '.join(missing)}. The model does not run them in "
                "this mode."
            )

    @contextlib.contextmanager
    def replacing(self, replace: Callable[[str, Tensor], Tensor]) -> Iterator[dict[str, Tensor]]:
        """Like `recording`, but the layers behind each tap receive `replace(name, feature)`.

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
        #: what has fired, and how often it had been written to by then
        self.versions: list[tuple[Tap, Tensor, int]] = []
        self.handles: list[Any] = []
        self.modes: list[_LastReluInput] = []
        self.takes_turns = False

    def attach(self, tap: Tap) -> None:
        """Hooks a tap's module, so that its next forward pass is recorded."""
        if tap.pre_relu:
            self.handles.append(tap.module.register_forward_pre_hook(self._enter_block))
            self.handles.append(tap.module.register_forward_hook(self._leave_block(tap)))
        elif tap.pre_norm:
            self.handles.append(tap.module.register_forward_pre_hook(self._take_input(tap)))
        else:
            self.handles.append(tap.module.register_forward_hook(self._take_output(tap)))

    def watch_turns(self, norms: nn.Module) -> None:
        """Lets a pass in which these norms run go on to its end."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.takes_turns = True

        self.handles.append(norms.register_forward_pre_hook(hook))

    def detach(self) -> None:
        """Removes all hooks, also after a forward pass that failed."""
        for handle in self.handles:
            handle.remove()
        while self.modes:  # an exception inside a block left its mode behind
            self.modes.pop().stop()

    def check(self) -> None:
        """Raises TapError for a feature that the pass has written over after it was read."""
        for tap, value, version in self.versions:
            if value._version != version:
                raise TapError(
                    f"Tap {tap.name!r}: the layers behind the {type(tap.module).__name__} write over its output (a "
                    "ReLU in place, say), so it cannot be read. Name the module that ends there."
                )

    def _enter_block(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        mode = _LastReluInput()
        mode.start()
        self.modes.append(mode)

    def _leave_block(self, tap: Tap) -> Callable[[nn.Module, tuple[Any, ...], Any], Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
            mode = self.modes.pop()
            mode.stop()
            if mode.value is None:
                raise TapError(
                    f"Tap {tap.name!r}: no ReLU runs in the last block ({type(module).__name__}) of that stage."
                )
            cells = mode.value.shape[1:3] if mode.channels_last else mode.value.shape[-2:]
            if isinstance(output, Tensor) and output.dim() == 4 and cells not in (output.shape[-2:], output.shape[1:3]):
                raise TapError(
                    f"Tap {tap.name!r}: the last activation in the last block ({type(module).__name__}) of that stage "
                    f"is not on its map, but on one of {' x '.join(map(str, cells))} cells (of squeeze-and-excitation, "
                    "say). Use the tap of the stage itself."
                )
            if isinstance(module, InvertedResidual):
                value = _before_activation(mode.value, output)
                self._store(tap, value)
                return _after_activation(value, mode.activation) if self.replace is None else self._refuse(tap, module)
            value = mode.value
            self._store(tap, value.permute(0, 3, 1, 2) if mode.channels_last else value)
            if self.replace is None:
                return None
            if mode.result is not output or mode.channels_last:
                self._refuse(tap, module)
            return mode.activation(self.replace(tap.name, mode.value))

        return hook

    def _refuse(self, tap: Tap, block: nn.Module) -> NoReturn:
        raise TapError(
            f"Tap {tap.name!r} cannot be replaced: the last ReLU of its block ({type(block).__name__}) does not give "
            "the block's output. Use the tap of the stage itself."
        )

    def _take_input(self, tap: Tap) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
        calls = itertools.count()

        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if tap.call not in (next(calls), None):
                return None
            self._store(tap, args[0])
            if self.replace is not None:
                return (self.replace(tap.name, args[0]), *args[1:])
            return (args[0].clone(), *args[1:]) if tap.copied else None

        return hook

    def _take_output(self, tap: Tap) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        calls = itertools.count()

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if tap.call not in (next(calls), None):
                return None
            value = output if tap.key is None else output[tap.key]
            value = _as_map(tap, value)
            self._store(tap, value)
            if self.replace is not None:
                return _put(tap, output, self.replace(tap.name, value))
            return _put(tap, output, value.clone()) if tap.copied else None

        return hook

    def _store(self, tap: Tap, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise TapError(f"Tap {tap.name!r} gives a {type(value).__name__}, not a tensor: name a module inside it.")
        if tap.name in self.features:
            raise TapError(
                f"Tap {tap.name!r} fires more than once in a forward pass: choose a call, e.g. '{tap.name}@0'."
            )
        if not value.is_inference():  # those have no number of times that they were written to
            self.versions.append((tap, value, value._version))
        self.features[tap.name] = value
        if self.stop_after == len(self.features) and not self.takes_turns:
            raise _AllTapsFired


def _before_activation(value: Tensor, output: Tensor) -> Tensor:
    """The map of a unit of ShuffleNetV2 before its last activation, which got `value`.

    It activates one half of its channels and interleaves it with the other, that it passes on (arXiv 1807.11164, figure
    3): the map is its output with that half as it was before.
    """
    return torch.stack([output[:, 0::2], value], dim=2).flatten(1, 2)


def _after_activation(value: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """The output of such a unit from that map, so that all behind depends on it."""
    return torch.stack([value[:, 0::2], activation(value[:, 1::2])], dim=2).flatten(1, 2)


def _put(tap: Tap, output: Any, value: Tensor) -> Any:
    """The output of the tap's module with another value at the tap."""
    if tap.key is not None:
        return {**output, tap.key: value}
    if _is_tokens(tap, output):
        return torch.cat([output[:, : _num_prefix(tap, output)], value.flatten(2).transpose(1, 2)], dim=1)
    return value.permute(0, 2, 3, 1) if tap.channels_last and value.dim() == 4 else value


def _is_tokens(tap: Tap, output: Any) -> bool:
    return tap.prefix_tokens is not None and isinstance(output, Tensor) and output.dim() == 3


def _num_prefix(tap: Tap, tokens: Tensor) -> int:
    """How many tokens stand before those of the patches: none in the blocks that get a class token behind them."""
    return 0 if _side_of(tokens.shape[1]) else tap.prefix_tokens or 0


def _side_of(count: int) -> int:
    """The side of a square of so many tokens; 0 where they are none."""
    side = math.isqrt(count)
    return side if side * side == count else 0


def _as_map(tap: Tap, value: Any) -> Any:
    """What a tap gives, with the channels in the second place."""
    if _is_tokens(tap, value):
        patches = value[:, _num_prefix(tap, value) :]
        side = _side_of(patches.shape[1])
        if not side:
            raise TapError(
                f"Tap {tap.name!r} gives {patches.shape[1]} tokens, which are no square: blocks of such a transformer "
                "can be tapped where images are square."
            )
        return patches.transpose(1, 2).unflatten(2, (side, side))
    return value.permute(0, 3, 1, 2) if tap.channels_last and isinstance(value, Tensor) and value.dim() == 4 else value


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model in evaluation mode for a block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
