"""Reads checkpoint files that may come from anyone: tensors, arrays and plain containers, never code."""

import collections
import os
import pickle
import re
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch


class InvalidCheckpointError(RuntimeError):
    """A checkpoint file that cannot be used; the message names the file, the reason and what to do."""


def load_torch_file(path: str) -> Any:
    """Reads a file written by `torch.save`, on the CPU; NumPy arrays and scalars inside are allowed.

    Args:
        path: a local file.

    Raises:
        InvalidCheckpointError: if the file is truncated, is not such a file, or refers to anything but data.
    """
    with torch.serialization.safe_globals(_numpy_safe_globals()):
        return _read(path, lambda: torch.load(path, map_location="cpu", weights_only=True))


def load_pickle_file(path: str) -> Any:
    """Reads a pickle that holds only NumPy arrays, numbers, strings and plain containers.

    Pickles of Python 2 are read as well (Caffe2 and early Detectron models).

    Args:
        path: a local file.

    Raises:
        InvalidCheckpointError: if the file is truncated, is not a pickle, or refers to anything but data.
    """

    def load() -> Any:
        with open(path, "rb") as f:
            return _DataUnpickler(f, encoding="latin1").load()

    return _read(path, load)


def _read(path: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except MemoryError:
        raise
    except Exception as error:
        raise InvalidCheckpointError(_explain(path, error)) from None


def _explain(path: str, error: Exception) -> str:
    text = str(error)
    refused = re.search(r"GLOBAL (\S+)", text) or re.search(r"refused: (\S+)", text)
    if refused:
        return (
            f"Refused to load {path}: besides data it asks for '{refused.group(1)}', and a file that calls "
            "code can do anything. If you trust it, convert it elsewhere to a dict of tensors or arrays."
        )
    detail = next((line for line in text.splitlines() if line.strip()), "").split(". ")[0][:200]
    reason = _describe_foreign_file(path) or f"it is truncated or not a checkpoint ({type(error).__name__}: {detail})"
    return f"Cannot load {path}: {reason}. Download or copy the file again, and check the path."


def _describe_foreign_file(path: str) -> str | None:
    size = os.path.getsize(path)
    if size == 0:
        return "the file is empty"
    with open(path, "rb") as f:
        head = f.read(64)
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, probably the error page of a download"
    return None


def _numpy_safe_globals() -> list[Any]:
    """Globals that torch must allow so that NumPy arrays of numbers can be read."""
    dtypes = {type(np.dtype(code)) for code in "?bhilqBHILQefdFDSU"}
    names = [(obj, f"{module}.{name}") for (module, name), obj in _NUMPY_GLOBALS.items() if module != "numpy"]
    return [np.ndarray, np.dtype, (_encode, "_codecs.encode"), *dtypes, *names]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Returns the bytes that pickles of protocol 2 store as text."""
    return text.encode("latin1" if encoding in ("latin1", "latin-1") else "utf-8")


# NumPy moved its internals, so a file may name either place; the functions are the same.
_RECONSTRUCT = np.zeros(1).__reduce__()[0]
_SCALAR = np.float64(0).__reduce__()[0]
_FROM_BUFFER = np.zeros(1).__reduce_ex__(5)[0]
_NUMPY_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _RECONSTRUCT for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _SCALAR for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _FROM_BUFFER for core in ("core", "_core")},
}
_ALLOWED_GLOBALS: dict[tuple[str, str], Any] = {
    **_NUMPY_GLOBALS,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _encode,
    **{("builtins", cls.__name__): cls for cls in (set, frozenset, complex)},
    **{("__builtin__", cls.__name__): cls for cls in (set, frozenset, complex)},
}


class _DataUnpickler(pickle.Unpickler):
    """Resolves the few names that arrays and containers need, and refuses all others."""

    def __init__(self, file: BinaryIO, *, encoding: str) -> None:
        super().__init__(file, encoding=encoding)

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED_GLOBALS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"refused: {module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("refused: persistent objects")
