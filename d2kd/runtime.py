"""Decides what the name `detectron2` means in this process, and has d2kd's models registered there.

Both without importing anything heavy: `import d2kd` puts finders into the import system, and they do their work when
`detectron2` is imported. `RUNTIME`, a `Runtime`, says what the name resolved to.
"""

import functools
import importlib
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

CHOICES = ("auto", "detectron2", "d2lite")

#: What registers itself when it is imported, in this order: methods with their keys; models, passes and their keys.
_PARTS = ("d2kd.distillers", "d2kd.modeling")
#: The package whose import has d2kd's models registered: it has the registries of models.
_REGISTRIES = "detectron2.modeling"


class Runtime(NamedTuple):
    """Which package answers to `detectron2`, and its version."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def prepare_runtime() -> None:
    """Makes `import detectron2` work, and registers d2kd's models on the first import of `detectron2.modeling`.

    The real Detectron2 is taken where it is installed, else d2lite; the environment variable `D2KD_RUNTIME`
    (auto, detectron2 or d2lite) overrides. What is already imported as `detectron2` stays. Calling it again does
    nothing.

    Raises:
        ValueError: `D2KD_RUNTIME` has another value.
        ImportError: `D2KD_RUNTIME=detectron2` where Detectron2 is not installed.
    """
    choice = os.environ.get("D2KD_RUNTIME", "auto").lower()
    if choice not in CHOICES:
        raise ValueError(f"D2KD_RUNTIME is {choice!r}; it must be one of {', '.join(CHOICES)}.")
    if "detectron2" not in sys.modules:
        installed = choice != "d2lite" and _is_installed()
        if choice == "detectron2" and not installed:
            raise ImportError(
                "D2KD_RUNTIME=detectron2, but Detectron2 is not installed: install it, or unset the variable."
            )
        if not installed:
            importlib.import_module("d2lite.alias").install("detectron2")
    if _REGISTRIES in sys.modules:
        register_parts()
    elif not any(isinstance(finder, _RegisteringFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisteringFinder())


@functools.cache
def resolve_runtime() -> Runtime:
    """Returns what `detectron2` is, imported; errors are those of `prepare_runtime`."""
    prepare_runtime()
    module = importlib.import_module("detectron2")
    return Runtime(module.__name__, getattr(module, "__version__", "unknown"))


def is_d2lite() -> bool:
    """Returns whether `detectron2` is d2lite, which takes no time to import; Detectron2 itself is not imported."""
    if "detectron2" not in sys.modules and _is_installed():
        return False
    return resolve_runtime().name == "d2lite"


def _is_installed() -> bool:
    """Whether there is a package of that name, and not just a folder: a clone of Detectron2 has one around it."""
    spec = importlib.util.find_spec("detectron2")
    return spec is not None and spec.origin is not None


def register_parts() -> None:
    """Imports what registers methods, architectures, backbones, heads and teacher passes, and declares their keys."""
    for name in _PARTS:
        importlib.import_module(name)


class _RegisteringFinder(importlib.abc.MetaPathFinder):
    """Finds `detectron2.modeling` as the other finders do, and has d2kd's models registered once it is there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRIES:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(importlib.abc.Loader):
    """Loads by another loader, in whose place it is for the time of the import only, and registers."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        # imports nothing again where d2kd.modeling is what imports Detectron2's
        register_parts()


if TYPE_CHECKING:
    RUNTIME: Runtime


def __getattr__(name: str) -> Any:
    """`RUNTIME`, once it is asked for: Detectron2 itself is slow to import."""
    if name == "RUNTIME":
        return resolve_runtime()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
