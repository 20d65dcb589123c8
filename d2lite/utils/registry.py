"""Registries of named classes, and the lookup of objects by their dotted path."""

import pydoc
from typing import Any

from fvcore.common.registry import Registry

__all__ = ["Registry", "locate"]


def locate(name: str) -> Any:
    """
    Return the object with a dotted path such as `"torch.nn.Module"`, importing what it needs.

    Raises:
        ImportError: there is no such object.
    """
    found = pydoc.locate(name)
    if found is None:
        raise ImportError(f"Cannot locate object {name!r}: no such module, class or function.")
    return found
