"""The config node, the global config, and `configurable`: explicit arguments or a config."""

import difflib
import functools
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from typing import IO, Any

import yaml
from fvcore.common.config import BASE_KEY
from fvcore.common.config import CfgNode as _CfgNode

from d2lite.config.arithmetic import evaluate_arithmetic
from d2lite.config.versions import upgrade_old_keys
from d2lite.utils.file_io import PathManager

logger = logging.getLogger(__name__)


class _SafeLoader(yaml.SafeLoader):
    """The safe loader, and the one Python tag that Detectron2's own files have: anchor sizes as arithmetic."""

    def construct_arithmetic(self, node: yaml.Node) -> Any:
        arguments = self.construct_sequence(node) if isinstance(node, yaml.SequenceNode) else []
        problem = "the tag !!python/object/apply:eval needs a list of one string"
        if len(arguments) == 1 and isinstance(arguments[0], str):
            try:
                return evaluate_arithmetic(arguments[0])
            except ValueError as e:
                problem = str(e)
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_SafeLoader.add_constructor("tag:yaml.org,2002:python/object/apply:eval", _SafeLoader.construct_arithmetic)


class CfgNode(_CfgNode):
    """A tree of config keys with attribute access.

    Beyond `fvcore.common.config.CfgNode`: YAML is only ever read by the safe loader, files of older
    Detectron2 versions get their keys renamed, and an unknown key is reported with its near matches.
    """

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[str]:
        return PathManager.open(filename, "r")

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        """Reads a YAML file and the files that its `_BASE_` names.

        Args:
            filename: path of the file. A relative `_BASE_` is relative to its directory.
            allow_unsafe: accepted for compatibility; the safe loader is used in either case.

        Returns:
            A plain nested dict in which the file overrides its base.

        Raises:
            ValueError: if the file is not YAML, uses a tag that would run Python code (except for arithmetic under
                `!!python/object/apply:eval`, which is evaluated without running it), or holds no mapping.
        """
        try:
            with cls._open_cfg(filename) as f:
                mapping = yaml.load(f, Loader=_SafeLoader)
        except yaml.constructor.ConstructorError as e:
            raise ValueError(
                f"Config file {filename} has a YAML tag that is not loaded for safety ({e.problem}): "
                "write the value out in plain YAML."
            ) from None
        except yaml.YAMLError as e:
            raise ValueError(f"Config file {filename} is not valid YAML: {e}") from None
        if mapping is not None and not isinstance(mapping, dict):
            raise ValueError(
                f"Config file {filename} must hold a mapping of keys to values, not {type(mapping).__name__}."
            )
        if not mapping or BASE_KEY not in mapping:
            return mapping or {}
        return super().load_yaml_with_base(filename, allow_unsafe=False)

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = False) -> None:
        """Overrides this config by a YAML file. Files of version 0 and 1, and files without a VERSION that use
        keys of those versions, are upgraded.

        Args:
            cfg_filename: path of the file.
            allow_unsafe: accepted for compatibility; the safe loader is used in either case.

        Raises:
            FileNotFoundError: if there is no such file.
            KeyError: if the file has a key that this config does not have.
            ValueError: if a value has another type than the default, or the file cannot be read as a config.
        """
        loaded = self.load_yaml_with_base(cfg_filename)
        if upgrade_old_keys(loaded, self.get("VERSION")):
            logger.warning("Config file %s has keys of an older version; they were renamed.", cfg_filename)
        self.merge_from_other_cfg(type(self)(loaded))

    def merge_from_other_cfg(self, cfg_other: "CfgNode") -> None:
        """Overrides this config by another one. Raises KeyError for a key that this one does not have."""
        try:
            super().merge_from_other_cfg(cfg_other)
        except KeyError as e:
            raise KeyError(self._with_near_matches(e.args[0])) from None

    def merge_from_list(self, cfg_list: list[Any]) -> None:
        """Overrides this config by `[key, value, key, value, ...]`. String values are read as Python literals.

        Raises:
            AssertionError: if the number of entries is odd, or a key does not exist.
        """
        try:
            super().merge_from_list(cfg_list)
        except AssertionError as e:
            raise AssertionError(self._with_near_matches(e.args[0] if e.args else "")) from None

    def _with_near_matches(self, message: str) -> str:
        unknown = re.search(r"Non-existent (?:config )?key: (\S+)", str(message))
        if unknown is None:
            return message
        near = difflib.get_close_matches(unknown.group(1), list(_dotted_keys(self)), n=3)
        return f"{message}. Did you mean {' or '.join(near)}?" if near else message


def _dotted_keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, CfgNode):
            yield from _dotted_keys(value, f"{prefix}{key}.")


global_cfg = CfgNode()
"""The config last given to `set_global_cfg`; empty before."""


def get_cfg() -> CfgNode:
    """Returns a fresh copy of the default config."""
    from d2lite.config.defaults import _C

    return _C.clone()


def set_global_cfg(cfg: CfgNode) -> None:
    """Publishes `cfg` as `global_cfg`, for code that no config reaches otherwise."""
    global_cfg.clear()
    global_cfg.update(cfg)


def configurable(
    init_func: Callable | None = None, *, from_config: Callable[..., dict[str, Any]] | None = None
) -> Callable:
    """Lets a constructor or a function with explicit arguments also be called with a config.

    On a constructor, the class provides the translation.

    Example::

        class Head(nn.Module):
            @configurable
            def __init__(self, channels, norm=""): ...

            @classmethod
            def from_config(cls, cfg, input_shape):
                return {"channels": input_shape.channels, "norm": cfg.MODEL.HEAD.NORM}

        Head(channels=3)                     # explicit
        Head(cfg, input_shape)               # through from_config
        Head(cfg, input_shape, norm="GN")    # through from_config; norm is not one of its parameters and wins

    On a function, the translation is given: `@configurable(from_config=lambda cfg: {...})`.

    Args:
        init_func: an `__init__` method.
        from_config: for functions; takes the config first and returns the keyword arguments of the function.

    Raises:
        AttributeError: (when called) the class has no `from_config`.
        TypeError: (when called) its `from_config` is not a classmethod, or its first parameter is not `cfg`.
    """
    if init_func is not None:
        if not (inspect.isfunction(init_func) and init_func.__name__ == "__init__" and from_config is None):
            raise TypeError("@configurable without arguments is for __init__; functions need from_config=...")
        return _configurable_init(init_func)
    if from_config is None:
        return configurable
    if not inspect.isfunction(from_config):
        raise TypeError("from_config of @configurable must be a function.")
    return functools.partial(_configurable_function, from_config=from_config)


def _configurable_init(init: Callable) -> Callable:
    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        translate = getattr(type(self), "from_config", None)
        if translate is None:
            raise AttributeError(f"{type(self).__name__} is @configurable but has no from_config.")
        if not inspect.ismethod(translate):
            raise TypeError(f"{type(self).__name__}.from_config must be a classmethod.")
        if _called_with_cfg(args, kwargs):
            init(self, **_explicit_arguments(translate, args, kwargs))
        else:
            init(self, *args, **kwargs)

    return wrapped


def _configurable_function(function: Callable, from_config: Callable[..., dict[str, Any]]) -> Callable:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if _called_with_cfg(args, kwargs):
            return function(**_explicit_arguments(from_config, args, kwargs))
        return function(*args, **kwargs)

    wrapped.from_config = from_config
    return wrapped


def _called_with_cfg(args: tuple, kwargs: dict[str, Any]) -> bool:
    return (bool(args) and _is_config(args[0])) or _is_config(kwargs.get("cfg"))


def _is_config(value: Any) -> bool:
    # omegaconf is not a dependency; its nodes are recognized by the module of their class.
    return isinstance(value, _CfgNode) or (
        type(value).__name__ == "DictConfig" and type(value).__module__.startswith("omegaconf")
    )


def _explicit_arguments(translate: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(translate).parameters
    if next(iter(parameters), None) != "cfg":
        raise TypeError(f"The first parameter of {translate.__qualname__} must be named 'cfg'.")
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values()):
        return translate(*args, **kwargs)
    known = {name: value for name, value in kwargs.items() if name in parameters}
    overrides = {name: value for name, value in kwargs.items() if name not in parameters}
    return {**translate(*args, **known), **overrides}
