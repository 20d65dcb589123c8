"""Decides what the name `detectron2` means in this process: the real Detectron2, or d2lite under that name."""

import importlib
import importlib.util
import os
import sys
from typing import NamedTuple

CHOICES = ("auto", "detectron2", "d2lite")


class Runtime(NamedTuple):
    """Which package answers to `detectron2`, and its version."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def resolve_runtime() -> Runtime:
    """Makes `import detectron2` work and says what it resolved to.

    The real Detectron2 is taken where it is installed, else d2lite; the environment variable `D2KD_RUNTIME`
    (auto, detectron2 or d2lite) overrides. What is already imported as `detectron2` stays.

    Raises:
        ValueError: `D2KD_RUNTIME` has another value.
        ImportError: `D2KD_RUNTIME=detectron2` where Detectron2 is not installed.
    """
    choice = os.environ.get("D2KD_RUNTIME", "auto").lower()
    if choice not in CHOICES:
        raise ValueError(f"D2KD_RUNTIME is {choice!r}; it must be one of {', '.join(CHOICES)}.")
    if "detectron2" not in sys.modules:
        installed = choice != "d2lite" and importlib.util.find_spec("detectron2") is not None
        if choice == "detectron2" and not installed:
            raise ImportError(
                "D2KD_RUNTIME=detectron2, but Detectron2 is not installed: install it, or unset the variable."
            )
        if not installed:
            importlib.import_module("d2lite.alias").install("detectron2")
    module = importlib.import_module("detectron2")
    return Runtime(module.__name__, getattr(module, "__version__", "unknown"))


RUNTIME = resolve_runtime()
