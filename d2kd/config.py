"""The keys that d2kd adds to a configuration, how others add theirs, and how all values are checked.

Keys that belong to one part stand in that part's file: those of a method in its class (`d2kd.settings`), those of an
architecture or backbone beside it (`declare_keys`), the others in `d2kd.core_keys` and `d2kd.input_keys`; all of them
are in docs/keys.md. Rules for Detectron2's own keys: `d2kd.detectron2_keys`. Reading them: `d2kd.config_reader`.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from d2kd.core_keys import CORE_KEYS
from d2kd.core_keys import EPOCHS as EPOCHS
from d2kd.detectron2_keys import check_together, with_types
from d2kd.input_keys import INPUT_KEYS
from d2kd.plugins import import_installed
from d2kd.runtime import register_parts
from d2kd.settings import Setting
from detectron2.config import CfgNode, get_cfg

_declared = {**CORE_KEYS, **INPUT_KEYS}
_key_adders: list[Callable[[CfgNode], None]] = []


def declare_keys(node: str, **settings: Any) -> None:
    """Declares keys below a node by `setting`, with their defaults, ranges and documentation.

    >>> declare_keys("MODEL.MY_HEAD", NUM_CONVS=setting(4, "Convolutions.", at_least=0))
    """
    _declared.update({f"{node}.{key}": declared for key, declared in settings.items()})


def config_keys(add: Callable[[CfgNode], None]) -> Callable[[CfgNode], None]:
    """Registers a function that adds keys to a configuration; a decorator for keys that `declare_keys` cannot give."""
    _key_adders.append(add)
    return add


def add_distill_config(cfg: CfgNode) -> None:
    """Adds d2kd's keys, with their defaults, to a Detectron2 configuration: the core's and all registered ones."""
    register_parts()
    import_installed()
    cfg.DISTILL = CfgNode()
    for key, declared in _declared.items():
        *path, name = key.split(".")
        node = cfg
        for part in path:
            node = node.setdefault(part, CfgNode())
        node[name] = copy.copy(declared.default)
    for add in _key_adders:
        add(cfg)


@cache
def _detectron2_settings() -> Sequence[tuple[str, Setting]]:
    """Made once: every configuration that is read is checked against them."""
    return list(with_types(dict(leaves(get_cfg()))))


_settings: list[Callable[[], Iterable[tuple[str, Setting]]]] = [
    _declared.items,
    _detectron2_settings,
]
_checks: list[Callable[[CfgNode], None]] = [check_together]


def key_settings(
    listing: Callable[[], Iterable[tuple[str, Setting]]],
) -> Callable[[], Iterable[tuple[str, Setting]]]:
    """Registers a function that lists whole keys with their declarations; a decorator for whoever adds them himself."""
    _settings.append(listing)
    return listing


def config_check(check: Callable[[CfgNode], None]) -> Callable[[CfgNode], None]:
    """Registers a function that raises ConfigError where values do not go together; a decorator."""
    _checks.append(check)
    return check


_fills: list[Callable[[CfgNode], None]] = []


def config_fill(fill: Callable[[CfgNode], None]) -> Callable[[CfgNode], None]:
    """Registers a function that sets keys which follow from others, after a configuration was read; a decorator."""
    _fills.append(fill)
    return fill


def fill_values(cfg: CfgNode) -> None:
    """Sets the keys that follow from others, such as the pixels that a network of timm expects."""
    for fill in _fills:
        fill(cfg)


def list_declared() -> dict[str, Setting]:
    """Returns the declarations of d2kd's core and of `declare_keys`, by whole key."""
    register_parts()
    return dict(_declared)


def list_settings() -> dict[str, Setting]:
    """Returns the declarations of all keys, of the core, of what is registered and of Detectron2, by whole key."""
    register_parts()
    return {key: declared for listing in _settings for key, declared in listing()}


def check_values(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: a value has another type than its key, is out of range, or does not go with another.
    """
    for key, declared in list_settings().items():
        declared.check(key, get_key(cfg, key, declared.default))
    for check in _checks:
        check(cfg)


class RenamedKey(NamedTuple):
    """What became of a key, or (where `old` is `new`) of its values, in a later version."""

    old: str
    #: "" where the key has no effect any more.
    new: str
    #: From old to new value; raises ConfigError where there is none.
    convert: Callable[[Any], Any] = lambda value: value


_renamed: list[Callable[[], Iterable[RenamedKey]]] = [
    lambda: [RenamedKey(f"DISTILL.INHERIT.{key}", f"DISTILL.INIT_FROM_TEACHER.{key}") for key in ("ENABLED", "EXCLUDE")]
]


def renamed_keys(listing: Callable[[], Iterable[RenamedKey]]) -> Callable[[], Iterable[RenamedKey]]:
    """Registers a function that lists renamed keys; a decorator for whoever has some."""
    _renamed.append(listing)
    return listing


def list_renamed_keys() -> list[RenamedKey]:
    """Returns all renamed keys and values, of the core and of what is registered."""
    values = [RenamedKey(key, key, s.renamed) for key, s in list_settings().items() if s.renamed_values]
    return [*(renamed for listing in _renamed for renamed in listing()), *values]


def list_path_keys() -> list[str]:
    """Returns all keys with paths of files, which are looked for beside the YAML that names them, too."""
    return [key for key, declared in list_settings().items() if declared.path]


def get_key(cfg: Any, key: str, default: Any = None) -> Any:
    """Returns the value of a whole key, e.g. "MODEL.FCOS.NUM_CLASSES", in nested dictionaries; else the default."""
    for part in key.split("."):
        if not isinstance(cfg, dict) or part not in cfg:
            return default
        cfg = cfg[part]
    return cfg


def with_values(cfg: CfgNode, values: Mapping[str, Any]) -> CfgNode:
    """Returns a configuration, frozen, with some whole keys set."""
    changed = cfg.clone()
    changed.defrost()
    for key, value in values.items():
        *path, name = key.split(".")
        (get_key(changed, ".".join(path)) if path else changed)[name] = value
    changed.freeze()
    return changed


def leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (whole key, value) of every key that is no node."""
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
