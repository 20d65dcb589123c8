"""What is registered, with a line of help for each name: slow to import, as it imports all of it.

python -m d2kd.cli.registered > d2kd/cli/names.json    # what `d2kd list` reads instead; a test compares the two
"""

import inspect
import json
from collections.abc import Iterable
from typing import Any

from d2kd.config import list_renamed_keys, list_settings
from d2kd.distillers import DISTILLERS
from d2kd.modeling.architectures import ARCHITECTURES
from d2kd.modeling.teacher_passes import TEACHER_PASSES
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY

from .names import Names, first_sentence, registrations


def registered_names() -> Names:
    """Returns lines of help by what is listed and by the names that a configuration uses."""
    return {
        "methods": _named(DISTILLERS),
        "architectures": _architectures(),
        "backbones": _named(BACKBONE_REGISTRY),
        "heads": _named(SEM_SEG_HEADS_REGISTRY),
        "passes": _named(TEACHER_PASSES),
    }


def registered_keys() -> list[str]:
    """Returns all keys of a configuration, also those that have other names now."""
    return sorted({*list_settings(), *(renamed.old for renamed in list_renamed_keys())})


def table() -> dict[str, Any]:
    """Returns what names.json holds."""
    names = {kind: dict(sorted(found.items())) for kind, found in registered_names().items()}
    return {"registrations": registrations(), "names": names, "keys": registered_keys()}


def _named(registry: Iterable[tuple[str, Any]]) -> dict[str, str]:
    return {name: _help(thing) for name, thing in registry}


def _architectures() -> dict[str, str]:
    """Those that can be built, and what d2kd knows of them, or of the nearest of their base classes."""
    found = {}
    for name, build in META_ARCH_REGISTRY:
        names = [name, *(base.__name__ for base in getattr(build, "__mro__", ()))]
        known = next((ARCHITECTURES[n] for n in names if n in ARCHITECTURES), None)
        own = getattr(build, "__module__", "").startswith("d2kd.")  # whose help says more
        found[name] = _help(build if own else known) if known else "d2kd knows its features only."
    return found


def _help(thing: Any) -> str:
    return first_sentence(" ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split()))


if __name__ == "__main__":
    print(json.dumps(table(), indent=1))
