"""Reading configurations: YAML files and what they are based on, imports, renamed keys, and clear errors."""

import ast
import logging
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from d2kd.config import (
    EPOCHS,
    RenamedKey,
    add_distill_config,
    check_values,
    fill_values,
    leaves,
    list_path_keys,
    list_renamed_keys,
)
from d2kd.errors import ConfigError, UserError, did_you_mean
from d2kd.files import find_config
from d2kd.model_zoo import is_of_zoo
from d2kd.plugins import import_plugins
from detectron2.config import CfgNode, get_cfg

logger = logging.getLogger(__name__)

_IMPORTS = "DISTILL.IMPORTS"
_told: set[str] = set()


def read_config(
    path: str,
    options: Sequence[Any] = (),
    imports: Sequence[str] = (),
    *,
    source: str = "the command line",
    notices: list[str] | None = None,
) -> CfgNode:
    """Returns Detectron2's defaults and d2kd's, changed by a YAML file and a list of [KEY, value, ...].

    Files named by DISTILL.IMPORTS are imported first, so that the keys of what they register exist: beside the YAML
    that names them (also one in `_BASE_`), else in the working directory. Options for that key replace the YAML's.

    Args:
        path: of the YAML file; "" for none.
        options: changes on top of it; values may be strings, as on a command line.
        imports: further files and modules to import.
        source: where the options come from, for messages.
        notices: takes what is to be logged, such as old keys that are still accepted; None logs it, once in a process.

    Raises:
        ConfigError: the file cannot be read, a key does not exist (the message lists near matches), or a value has
            another type than its default, is out of range, or does not go with another.
    """
    pairs = _pairs(options, source)
    chosen = [value for key, value in pairs if key == _IMPORTS]
    loader = _loader(with_imports=not chosen)
    flat: dict[str, Any] = {}
    if path:
        try:
            flat = _flatten(loader.load_yaml_with_base(path))
        except UserError:
            raise
        except (KeyError, ValueError, AssertionError, OSError, yaml.YAMLError) as error:
            raise ConfigError(f"In {path}: {_text(error)}") from error
        except (AttributeError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"In {path}: _BASE_, there or in a file that it names, is no path, or files are based on each other."
            ) from error
    beside = os.path.dirname(path)
    named = import_plugins([*_names(_IMPORTS, chosen[-1] if chosen else []), *imports], ["", beside])
    pairs, words = _rename([pair for pair in pairs if pair[0] != _IMPORTS])
    for where, renamed in {**loader.words, source: words}.items():
        if renamed:
            tell(f"Old keys in {where}, still accepted: {'; '.join(renamed)}", notices)
    pairs, dropped = _with_lengths(pairs, flat)
    for where, keys in {**loader.dropped, source: dropped}.items():
        if keys:
            tell(f"{where} gives a length in iterations, which replaces that in epochs: {', '.join(keys)}", notices)
    cfg = get_cfg()
    add_distill_config(cfg)
    defaults = dict(leaves(cfg))
    _merge(cfg, lambda: _merge_content(cfg, path, _with_types(list(flat.items()), defaults)), path)
    for key, _ in pairs:
        above = next((leaf for leaf in defaults if key.startswith(f"{leaf}.")), None)
        if above is not None:
            raise ConfigError(f"In {source}: Non-existent key: {key}; there is {above}, with no key below it.")
    # text that looks like a number is read once more there
    changes = [x for key, v in _with_types(pairs, defaults) for x in (key, repr(v) if isinstance(v, str) else v)]
    _merge(cfg, lambda: cfg.merge_from_list(changes), source)
    cfg.DISTILL.IMPORTS = list(dict.fromkeys([*loader.imports, *named]))
    check_values(cfg)
    fill_values(cfg)
    return cfg


class _Loader(CfgNode):
    """Loads a YAML file and its bases; each of them imports what it names, and has its old keys renamed."""

    imports: list[str]
    words: dict[str, list[str]]
    dropped: dict[str, list[str]]
    with_imports: bool
    #: what the bases of the file that is read now say, by whole key
    below: dict[str, Any]

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        """Reads one file upon its bases, as Detectron2 does, but never runs code that YAML tags name.

        A base that is not there is the recipe of that name, as in `--config-file`: `_BASE_: configs/COCO/...`. Files of
        Detectron2's own model zoo may have such tags.
        """
        filename = _recipe(filename)
        beside, cls.below = cls.below, {}
        flat = _flatten(super().load_yaml_with_base(filename, allow_unsafe=is_of_zoo(filename)))  # bases come here too
        names = _names(_IMPORTS, flat.pop(_IMPORTS, []))
        if cls.with_imports:
            cls.imports += import_plugins(names, [os.path.dirname(filename), ""])
        pairs, cls.words[filename] = _rename(list(flat.items()))
        own = [(key, value) for key, value in pairs if key not in cls.below or cls.below[key] != value]
        own, cls.dropped[filename] = _with_lengths(own, cls.below)
        pairs = list({**dict(pairs), **dict(own)}.items())
        cls.below = {**beside, **dict(pairs)}
        return _nest(_with_paths(pairs, os.path.dirname(filename)))


def _recipe(path: str) -> str:
    """`path`, or where there is none, the recipe that its end from "configs" on names."""
    parts = Path(path).parts
    if os.path.exists(path) or "configs" not in parts:
        return path
    end = len(parts) - 1 - parts[::-1].index("configs")
    recipe = find_config(os.path.join(*parts[end:]))
    return recipe if os.path.exists(recipe) else path


def _loader(with_imports: bool) -> type[_Loader]:
    empty: dict[str, Any] = {"imports": [], "words": {}, "dropped": {}, "below": {}}
    return type("Loader", (_Loader,), {**empty, "with_imports": with_imports})


def _pairs(options: Sequence[Any], source: str) -> list[tuple[str, Any]]:
    """Options as (key, value), values as Python literals where they are."""
    if len(options) % 2 or not all(isinstance(key, str) for key in options[::2]):
        raise ConfigError(
            f"Options of {source} come in pairs, KEY VALUE without '='; these are {len(options)}: "
            f"{' '.join(map(str, options))}"
        )
    return [(key, _literal(value)) for key, value in zip(options[::2], options[1::2])]


def _literal(value: Any) -> Any:
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return value


def _names(key: str, value: Any) -> list[str]:
    """A list of names; a single one may stand without brackets."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{key} is {value!r}; it must be a list of names.")
    return list(names)


def _flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    """Values of nested dictionaries by whole key; empty ones vanish."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _nest(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        *path, name = key.split(".")
        node = content
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key} cannot be set: {part} is {node!r}, not a mapping.")
        node[name] = value
    return content


def _rename(pairs: Sequence[tuple[str, Any]]) -> tuple[list[tuple[str, Any]], list[str]]:
    """Returns (key, value) with the keys and values of today, and what was renamed, in words."""
    renamed_keys = list_renamed_keys()
    result, words = [], []
    for key, value in pairs:
        if value is None and any(_is_old_node(renamed, key) for renamed in renamed_keys):
            continue
        removed = False
        for renamed in [renamed for renamed in renamed_keys if renamed.old == key]:
            new = _convert(renamed, value)
            if renamed.old != renamed.new or (new is not value and new != value):
                words += [_words(renamed, value, new)] if renamed.new or value else []  # nothing is lost with ""
                key, value, removed = renamed.new, new, not renamed.new
        result += [] if removed else [(key, value)]
    return result, words


def _is_old_node(renamed: RenamedKey, key: str) -> bool:
    """Whether a node is there no more, since what it held is elsewhere; with nothing in it, it may still be written."""
    node, new_node = (name.rpartition(".")[0] for name in (renamed.old, renamed.new))
    return key == node and bool(renamed.new) and node != new_node


def _convert(renamed: RenamedKey, value: Any) -> Any:
    try:
        return renamed.convert(value)
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(f"{renamed.old} is {value!r}; it is {renamed.new} now, and has no such value.") from error


def _words(renamed: RenamedKey, old: Any, new: Any) -> str:
    if not renamed.new:
        return f"{renamed.old} has no effect any more"
    changed = "" if old == new else f" {new!r}, not {old!r}"
    return (
        f"{renamed.old} is now{changed}"
        if renamed.old == renamed.new
        else f"{renamed.old} is now {renamed.new}{changed}"
    )


def tell(text: str, notices: list[str] | None) -> None:
    """Adds a line to `notices`, or without them logs it, once in a process."""
    if notices is not None:
        notices.append(text)
    elif text not in _told:
        _told.add(text)
        logger.warning("%s", text)


def _with_lengths(
    pairs: Sequence[tuple[str, Any]], below: Mapping[str, Any]
) -> tuple[list[tuple[str, Any]], list[str]]:
    """Lets a length in iterations count where that in epochs comes from what `pairs` are on top of.

    Returns:
        The pairs, with such lengths in epochs taken back, and these.
    """
    said = dict(pairs)
    old = [e for i, e in EPOCHS.items() if i in said and e not in said and below.get(e)]
    return [*pairs, *((key, [] if isinstance(below[key], (list, tuple)) else 0) for key in old)], [
        f"{key} {below[key]}" for key in old
    ]


def _with_types(pairs: Sequence[tuple[str, Any]], defaults: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Lets a whole number set a key that holds a float, and a single name one that holds names, without brackets."""

    def typed(default: Any, value: Any) -> Any:
        if isinstance(default, float) and type(value) is int and abs(value) < 2**63:
            return float(value)
        if isinstance(default, (list, tuple)) and isinstance(value, str) and all(type(x) is str for x in default):
            return [value] if value else []
        return value

    return [(key, typed(defaults.get(key), value)) for key, value in pairs]


def _with_paths(pairs: Sequence[tuple[str, Any]], directory: str) -> list[tuple[str, Any]]:
    """Paths of files that are not in the working directory, but beside the YAML in `directory`, become those."""
    keys = set(list_path_keys())

    def found(path: Any) -> Any:
        file, *options = path.split("?") if isinstance(path, str) else [""]
        beside = os.path.join(directory, file)
        if not file or "://" in file or os.path.exists(file) or not os.path.exists(beside):
            return path
        return "?".join([beside, *options])

    def with_paths(key: str, value: Any) -> Any:
        if key == "DATASETS.REGISTER" and isinstance(value, (list, tuple)):
            return [
                {k: v if k in ("NAME", "FORMAT", "SPLIT") else found(v) for k, v in entry.items()}
                if isinstance(entry, dict)
                else entry
                for entry in value
            ]
        return found(value) if key in keys else value

    return [(key, with_paths(key, value)) for key, value in pairs]


class _Dumper(yaml.SafeDumper):
    """Writes tuples as lists."""


_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)


def _merge_content(cfg: CfgNode, path: str, pairs: Sequence[tuple[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as directory:  # Detectron2 upgrades old versions of its own keys in files only
        file = os.path.join(directory, os.path.basename(path) or "none.yaml")
        with open(file, "w", encoding="utf-8") as opened:
            yaml.dump(_nest(pairs), opened, Dumper=_Dumper)
        cfg.merge_from_file(file)


def _merge(cfg: CfgNode, merge: Callable[[], None], where: str) -> None:
    try:
        merge()
    except (KeyError, ValueError, AssertionError, OSError) as error:
        message = _text(error)
        mismatch = re.search(r"Type mismatch \(<class '(\S+)'>.* vs\. (.*)\) for config key: (\S+)", message, re.DOTALL)
        if mismatch:
            kind, value, key = mismatch.groups()
            kind = kind.rpartition(".")[2]
            wanted = {"float": "a finite number", "CfgNode": "a mapping of keys"}.get(kind, f"of type {kind}")
            raise ConfigError(f"In {where}: {key} is {' '.join(value.split())}; it must be {wanted}.") from error
        unknown = re.search(r"[Nn]on-existent (?:config )?key:? ?([\w.]+)", message)
        hint = did_you_mean(unknown[1], dict(leaves(cfg)), cutoff=0.6) if unknown and "mean" not in message else ""
        raise ConfigError(f"In {where}: {message.rstrip('.')}{'' if message.endswith('?') else '.'}{hint}") from error


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, (OSError, UnicodeError)) or not error.args else str(error.args[0])
