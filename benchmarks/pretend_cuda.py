"""A GPU that is not there: tensors that say `cuda` and compute on the CPU, to find what would break on a real one.

    with PretendCuda() as gpu:
        model = build_model(cfg)  # MODEL.DEVICE cuda
        ...
    gpu.waits  # (place in this project, operator) -> how often the host waited for the device there

Unlike those of PyTorch's `FakeTensorMode`, these tensors have values, so that assignment, sampling and `nonzero` run as
they are. An operator on tensors of the device and of the CPU raises as CUDA's does, and so do a generator of the other
device and `numpy()`. For PyTorch's C++ the tensors lie on the CPU: what CUDA's own kernels do (precision, speed, types
that they lack) is not seen, and autocast is that of the CPU. For a process of its own, as much of `torch` is replaced.
"""

import collections
import contextlib
import importlib
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten

#: Operators whose arguments may be on two devices.
CROSS_DEVICE = {aten.copy_, aten._foreach_copy_, aten._to_copy}
#: Operators with indices, which may be on the CPU while what they index is on the device.
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
#: Operators whose result is a number, or has a size, that the host waits for.
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2}
WAITING |= {aten.unique_dim, aten.unique_consecutive, aten.equal}


class OnDevice(torch.Tensor):
    """A tensor that says that it is on the device; its values are in `values`, on the CPU."""

    values: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = DEVICE  # type: ignore[assignment]
    is_cuda = True  # type: ignore[assignment]
    is_cpu = False  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "OnDevice":
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "layout": values.layout}
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device="cpu", **layout)

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    # with these two, `nn.Module.to` makes parameters of them
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *_: Any) -> "OnDevice":
        return OnDevice(inner["values"])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.values.__reduce_ex__(protocol)  # files have the values

    def __repr__(self) -> str:
        return f"OnDevice({self.values})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})  # outside of the mode


class Generator(torch.Generator):
    """The CPU's generator, which may say that it is the device's."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        self = super().__new__(cls, "cpu")
        self.of = torch.device(device)
        return self

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:
        return self.of


class PretendCuda:
    """While it is entered, `cuda` is a device."""

    def __init__(self) -> None:
        #: (file:line of the innermost frame of this project, operator) -> how often the host waited there
        self.waits: collections.Counter[tuple[str, str]] = collections.Counter()
        #: > 0 while PyTorch's C++ works on tensors of the device: what it makes is there, too
        self.inside = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "PretendCuda":
        if torch.cuda.is_available():
            raise RuntimeError("There is a GPU: use that.")
        importlib.import_module(
            "torch._dynamo"
        )  # which PyTorch does where it first needs it, and it looks at torch.cuda
        for owner, replaced in _replacements(self):
            for name, value in replaced.items():
                self._stack.enter_context(mock.patch.object(owner, name, value))
        self._stack.enter_context(_Dispatch(self))
        self._stack.enter_context(_Functions(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def wait(self, name: str) -> None:
        """Notes that the host waits here."""
        self.waits[_place(), name] += 1

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """The block is PyTorch's work on tensors of the device."""
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


def _replacements(gpu: PretendCuda) -> list[tuple[Any, dict[str, Any]]]:
    autocast, enabled, dtype = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype
    backward = torch.autograd._engine_run_backward

    class Autocast(autocast):  # type: ignore[misc,valid-type]
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__(_host(device_type), *args, **kwargs)

    def run_backward(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        with gpu.working() if isinstance(_first(outputs), OnDevice) else contextlib.nullcontext():
            return backward(outputs, *args, **kwargs)

    def nothing(*_: Any, **__: Any) -> None:
        return None

    properties = types.SimpleNamespace(name="none", total_memory=2**36, major=9, minor=0, multi_processor_count=1)
    cuda = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "a GPU that is not there",
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (9, 0),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "max_memory_allocated": lambda *_: 0,
        "Event": _Event,
        **dict.fromkeys(("synchronize", "set_device", "set_rng_state", "reset_peak_memory_stats"), nothing),
    }
    general = {
        "Generator": Generator,
        "autocast": Autocast,
        "is_autocast_enabled": lambda *kind: enabled(*map(_host, kind)),
        "get_autocast_dtype": lambda kind: dtype(_host(kind)),
    }
    fork = torch.random.fork_rng
    without_devices = {"fork_rng": lambda devices=None, *args, **kwargs: fork([], *args, **kwargs)}
    checks = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
    capture = {name: nothing for name in checks if hasattr(torch.optim.Optimizer, name)}
    grouped = torch._C._group_tensors_by_device_and_dtype

    def group(lists: Any, with_indices: bool = False) -> Any:  # by the device that C++ sees
        found = grouped(lists, with_indices)
        return {(value[0][0][0].device, key[1]): value for key, value in found.items()}

    return [
        (torch._C, {"_group_tensors_by_device_and_dtype": group}),
        (torch.optim.Optimizer, capture),
        (torch.cuda, cuda),
        (torch, general),
        (torch.amp, {"autocast": Autocast}),
        (torch.random, without_devices),
        (torch.autograd, {"_engine_run_backward": run_backward}),
        (torch.Tensor, {"pin_memory": lambda x, *_: x}),
    ]


class _Event:
    """What is recorded has been done, and the host does not wait for it: it asks."""

    def __init__(self, **_: Any) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "_Event") -> float:
        return 1000 * (end.time - self.time)


def _host(kind: str) -> str:
    return "cpu" if kind == "cuda" else kind


class _Functions(TorchFunctionMode):
    """What PyTorch's Python functions do with devices before an operator is dispatched."""

    def __init__(self, gpu: PretendCuda) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        special = _SPECIAL.get(func)
        if special is not None:
            return special(self.gpu, *args, **kwargs)
        asked = kwargs.get("device")
        if asked is None and func is torch.Tensor.new_tensor:
            asked = args[0].device
        if asked is not None and torch.device(asked).type == "cuda":
            return self._made(func, args, kwargs)
        _check_generator(func, kwargs.get("generator"), args)
        if func in (torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad):
            return func(*args, **kwargs)
        here = any(isinstance(x, OnDevice) for x in tree_flatten((args, kwargs))[0])
        with self.gpu.working() if here else contextlib.nullcontext():
            return func(*args, **kwargs)

    def _made(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A tensor that is made on the device."""
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != "cuda":
            raise RuntimeError(f"{func.__name__}: expected a 'cuda' device type for generator but found 'cpu'")
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            if not isinstance(args[-1], OnDevice):
                self.gpu.wait("tensor")
        with self.gpu.working() if isinstance(args[0] if args else None, OnDevice) else contextlib.nullcontext():
            made = func(*args, **{**kwargs, "device": torch.device("cpu")})
        return made if isinstance(made, OnDevice) else OnDevice(made)


def _check_generator(func: Any, generator: Any, args: Any) -> None:
    if generator is None:
        return
    here = bool(args) and isinstance(args[0], OnDevice)
    if (generator.device.type == "cuda") != here:
        raise RuntimeError(f"{func.__name__}: the generator is on {generator.device}, the tensor is not")


def _to(gpu: PretendCuda, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    other = args[0] if args and isinstance(args[0], torch.Tensor) else kwargs.pop("other", None)
    if other is not None:
        args, kwargs = args[1:], {"device": other.device, "dtype": other.dtype, **kwargs}
    if not args or isinstance(args[0], torch.dtype):
        asked, args, kwargs = kwargs.pop("device", None), args, kwargs
    else:
        asked, args = args[0], args[1:]
    dtype = next((a for a in args if isinstance(a, torch.dtype)), kwargs.get("dtype")) or x.dtype
    non_blocking = kwargs.get("non_blocking", any(a is True for a in args[-1:]))
    target = x.device if asked is None else torch.device(asked)
    if (target.type == "cuda") == isinstance(x, OnDevice):
        with gpu.working():
            return torch.Tensor.to(x, dtype, copy=kwargs.get("copy", False))
    if not non_blocking:
        gpu.wait("to " + target.type)
    return _Move.apply(x, dtype)


class _Move(torch.autograd.Function):
    """To the other side."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ctx.dtype = x.dtype
        return _moved(x, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _moved(gradient, ctx.dtype), None


def _moved(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    with torch.no_grad(), torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        if isinstance(x, OnDevice):
            return x.values.detach().to(dtype, copy=True)
        return OnDevice(x.detach().to(dtype, copy=True))


def _to_list(gpu: PretendCuda, x: torch.Tensor) -> Any:
    if isinstance(x, OnDevice):
        gpu.wait("tolist")
        return x.values.tolist()
    return x.tolist()


def _to_numpy(gpu: PretendCuda, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if isinstance(x, OnDevice):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
    return torch.Tensor.numpy(x, *args, **kwargs)


def _to_array(gpu: PretendCuda, x: torch.Tensor, dtype: Any = None) -> Any:
    array = _to_numpy(gpu, x)
    return array if dtype is None else array.astype(dtype)


_SPECIAL: dict[Any, Callable[..., Any]] = {
    torch.Tensor.to: _to,
    torch.Tensor.cpu: lambda gpu, x, *_, **__: _to(gpu, x, "cpu"),
    torch.Tensor.cuda: lambda gpu, x, device=None, non_blocking=False: _to(gpu, x, DEVICE, non_blocking=non_blocking),
    torch.Tensor.tolist: _to_list,
    torch.Tensor.numpy: _to_numpy,
    torch.Tensor.__array__: _to_array,
}


class _Dispatch(TorchDispatchMode):
    """Unwraps, runs and wraps operators."""

    def __init__(self, gpu: PretendCuda) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _waits(func, args, kwargs):
            self.gpu.wait(_name(func))
        return _run(func, args, kwargs, self.gpu.inside > 0)


def _run(func: Any, args: Any, kwargs: dict[str, Any], inside: bool = False) -> Any:
    given = tree_flatten((args, kwargs))[0]
    here = any(isinstance(x, OnDevice) for x in given)
    made = inside and not any(isinstance(x, torch.Tensor) for x in given)
    if not here and not made:
        return func(*args, **kwargs)
    if here:
        _check_devices(func, args, given)
    plain_args, plain_kwargs = tree_map_only(OnDevice, lambda x: x.values, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    if func.overloadpacket in CROSS_DEVICE and not isinstance(_first(args), OnDevice):
        return result
    wrapped = tree_map_only(torch.Tensor, OnDevice, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if here else wrapped


def _first(args: Any) -> Any:
    return tree_flatten(args)[0][0]


def _check_devices(func: Any, args: Any, given: list[Any]) -> None:
    """
    Raises:
        RuntimeError: tensors of both devices, as CUDA has it.
    """
    packet = func.overloadpacket
    if packet in CROSS_DEVICE:
        return
    others = [x for x in given if isinstance(x, torch.Tensor) and not isinstance(x, OnDevice) and x.dim() > 0]
    if packet in INDEXING and isinstance(args[0], OnDevice):
        indices = tree_flatten(args[1])[0]
        others = [x for x in others if not any(x is index for index in indices)]
    if others:
        shapes = ", ".join(str(tuple(x.shape)) for x in others)
        raise RuntimeError(f"{_name(func)}: expected all tensors on the same device; on the CPU: {shapes}")


def _waits(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    packet = func.overloadpacket
    if packet is aten.copy_:
        return isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice) and not any(a is True for a in args[2:])
    if packet in INDEXING and isinstance(args[0], OnDevice):
        indices = [x for x in args[1] if x is not None]
        return any(x.dtype in (torch.bool, torch.uint8) or not isinstance(x, OnDevice) for x in indices)
    if packet is aten.repeat_interleave:
        return isinstance(args[0], OnDevice) and kwargs.get("output_size") is None
    return packet in WAITING and isinstance(args[0], OnDevice)


def _name(func: Any) -> str:
    return str(func.overloadpacket).removeprefix("aten.").lstrip("_")


def _place() -> str:
    """file:line of the innermost frame that is this project's."""
    frame: Any = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("d2kd", "d2lite"):
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
