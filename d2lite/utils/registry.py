"""Registries of named classes, and the lookup of objects by their dotted path."""

import difflib
import pydoc
from typing import Any

from fvcore.common.registry import Registry as _Registry

__all__ = ["Registry", "locate"]


class Registry(_Registry):
    """Objects by name, as in fvcore; an unknown name is reported with near matches."""

    def build(self, name: str, *args: Any) -> Any:
        """Calls the object registered under `name` with `args`."""
        return self.get(name)(*args)

    def get(self, name: str) -> Any:
        """Returns the object registered under `name`. Raises KeyError if there is none."""
        if name in self:
            return super().get(name)
        known = sorted(key for key, _ in self)
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(known) or 'none'}."
        raise KeyError(
            f"No object named '{name}' found in '{self._name}' registry! {hint} If Detectron2 or another project "
            "has it, import the module that registers it, or run with D2KD_RUNTIME=detectron2."
        )


def locate(name: str) -> Any:
    """Returns the object with a dotted path such as `"torch.nn.Module"`, importing what it needs.

    Raises:
        ImportError: if there is no such object.
    """
    found = pydoc.locate(name)
    if found is None:
        raise ImportError(f"Cannot locate object {name!r}: no such module, class or function.")
    return found
