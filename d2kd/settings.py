"""Settings: each key of a configurable part is declared once, with its default, range and documentation."""

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import ge, gt, le, lt
from typing import Any, ClassVar, NamedTuple

from d2kd.errors import ConfigError, did_you_mean, require_choice
from detectron2.config import CfgNode

#: Of numbers in settings: what a signed integer of 64 bits holds.
MAX_NUMBER = 2**63 - 1


class Rule(NamedTuple):
    """What a whole value must be, beyond type and bounds."""

    #: "must ...", for the message.
    words: str
    #: Called with a value of the right type, within bounds.
    holds: Callable[[Any], bool]


NOT_EMPTY = Rule("must not be empty", lambda value: bool(value.strip() if isinstance(value, str) else value))
DISTINCT = Rule("must name each once", lambda values: len(set(values)) == len(values))
SORTED = Rule("must be ascending", lambda values: values == sorted(values))
ASCENDING = Rule("must be ascending, each once", lambda values: values == sorted(set(values)))


def length(*numbers: int) -> Rule:
    """Returns the rule that a list has so many items; of a list of lists, each of them."""

    def holds(values: Sequence[Any]) -> bool:
        lists: list[Sequence[Any]] = [value for value in values if isinstance(value, list)] or [values]
        return all(len(value) in numbers for value in lists)

    return Rule(f"must be a list of {' or '.join(map(str, numbers))} items", holds)


@dataclass(frozen=True)
class Setting:
    """The declaration of one key; see `setting` for its fields."""

    default: Any
    doc: str = ""
    choices: Sequence[Any] | Callable[[], Sequence[Any]] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    infinite: bool = False
    items: type | None = None
    rule: Rule | None = None
    iterations: bool = False
    config_only: bool = False
    path: bool = False
    key: str = ""
    hint: str = ""
    renamed_values: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_list(self) -> bool:
        """Whether values are lists or tuples."""
        return isinstance(self.default, (list, tuple))

    @property
    def kind(self) -> type[Any]:
        """Type of the value, or of each item of a list (or of its lists); `object` stands for all types."""
        sample = self.default
        while isinstance(sample, (list, tuple)):
            sample = sample[0] if sample else ""
        return self.items or type(sample)

    @property
    def words(self) -> Sequence[Any]:
        """The values that are allowed; () where that is not a matter of choice."""
        return self.choices() if callable(self.choices) else self.choices

    @property
    def bounds(self) -> list[tuple[float, Callable[[float, float], bool], str]]:
        """Each bound with what must hold, as a function and in words."""
        bounds = (
            (self.at_least, ge, "at least"),
            (self.above, gt, "above"),
            (self.at_most, le, "at most"),
            (self.below, lt, "below"),
        )
        return [(bound, holds, words) for bound, holds, words in bounds if bound is not None]

    def check(self, key: str, value: Any) -> Any:
        """Returns the value in the type of the default (a whole number may stand for a float, a tuple for a list).

        Args:
            key: the whole key, for the message.

        Raises:
            ConfigError: the value has another type, or is out of range.
        """
        if value is None and self.default is None:
            return None
        value = self._check_list(key, value, self.default) if self.is_list else self._check_one(key, value)
        if self.rule is not None and not self.rule.holds(value):
            raise ConfigError(f"{key} is {value!r}; it {self.rule.words}.")
        return value

    def _check_list(self, key: str, values: Any, like: Sequence[Any]) -> list[Any]:
        if not isinstance(values, (list, tuple)):
            raise ConfigError(f"{key} is {values!r}; it must be a list.")
        inner = like[0] if like and isinstance(like[0], (list, tuple)) else None
        return [
            self._check_one(f"{key}[{i}]", value)
            if inner is None or not isinstance(value, (list, tuple))
            else self._check_list(f"{key}[{i}]", value, inner)
            for i, value in enumerate(values)
        ]

    def _check_one(self, key: str, value: Any) -> Any:
        kind = self.kind
        if kind is float and type(value) is int and abs(value) <= MAX_NUMBER:
            value = float(value)
        if type(value) is not kind and kind is not object:
            raise ConfigError(f"{key} is {value!r}; it must be of type {kind.__name__}.")
        if self.choices:
            require_choice(key, value, self.words, self.hint)
        if kind in (int, float):
            self._check_range(key, value)
        return value

    def _check_range(self, key: str, value: float) -> None:
        unbounded = self.infinite and value == math.inf
        if not unbounded and not -MAX_NUMBER <= value <= MAX_NUMBER:  # also false for NaN
            raise ConfigError(f"{key} is {value}; it must be a finite number, of at most 64 bits.")
        if not all(holds(value, bound) for bound, holds, _ in self.bounds):
            rule = " and ".join(f"{words} {bound:g}" for bound, _, words in self.bounds)
            raise ConfigError(f"{key} is {value}; it must be {rule}.")

    def renamed(self, value: Any) -> Any:
        """Returns the new word for an old one; other values as they are."""
        return self.renamed_values.get(value, value) if isinstance(value, str) else value

    def scaled(self, value: Any, factor: float) -> Any:
        """Returns a number of iterations, or a list of them, times a factor, rounded and still within range."""
        if isinstance(value, (list, tuple)):
            return [self.scaled(item, factor) for item in value]
        lowest = self.at_least if self.at_least is not None else -math.inf
        return int(max(lowest, round(value * factor)))


def setting(default: Any, doc: str, **declaration: Any) -> Any:
    """Declares a key in the body of a `Configurable` class: `ratio: float = setting(0.65, "Share ...", at_least=0)`.

    Args:
        default: of the YAML key and of the constructor's argument; its type is the key's type.
        doc: what it means, with its unit.
        declaration: `choices` (words that are allowed, or a function that lists them; `hint` follows the message for
            others); `at_least`, `above`, `at_most`, `below` (bounds of a number, or of every number in a list);
            `infinite=True` (it may be); `items` (type of a list's items, by default that of the default's, or str);
            `rule` (of the whole value, a `Rule`); `iterations=True` (counted in iterations: scaled with the number of
            processes, see SOLVER.REFERENCE_WORLD_SIZE); `config_only=True` (a YAML key that is no argument of the
            constructor); `path=True` (of a file; looked for beside the YAML that names it, too); `key` (the YAML key,
            by default the name in capitals); `renamed_values` (old words that configurations may still have, to new
            ones).
    """
    return Setting(default, doc, **declaration)


class Configurable:
    """A part with settings: its constructor's arguments and the keys of its YAML node have the same defaults.

    Attributes:
        DEFAULTS: defaults that differ from those that a base class declares, by YAML key.
        NODES: parts with settings of their own whose nodes lie below this one's, by name; beside those of base classes.
        SETTINGS: all declarations, those of base classes first, by attribute.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    NODES: ClassVar[Mapping[str, type["Configurable"]]] = {}
    SETTINGS: ClassVar[Mapping[str, Setting]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        settings: dict[str, Setting] = {}
        for part in reversed(cls.__mro__):
            settings.update(_declared_in(part))
            hidden = [name for name in settings if name in vars(part) and not isinstance(vars(part)[name], Setting)]
            if hidden:
                key = settings[hidden[0]].key
                raise TypeError(
                    f"{part.__name__}.{hidden[0]} hides a setting. Change its default in DEFAULTS[{key!r}] instead."
                )
            attributes = {declared.key: name for name, declared in settings.items()}
            if len(attributes) < len(settings):
                raise TypeError(f"Two settings of {part.__name__} have one key: {[d.key for d in settings.values()]}.")
            for key, default in vars(part).get("DEFAULTS", {}).items():
                if key not in attributes:
                    hint = did_you_mean(key, attributes)
                    raise TypeError(f"DEFAULTS of {part.__name__} names {key}, which is no setting.{hint}")
                declared = settings[attributes[key]]
                default = declared.check(f"The default of {part.__name__}.{key}", default)
                settings[attributes[key]] = replace(declared, default=default)
        for declared in settings.values():
            declared.check(f"The default of {cls.__name__}.{declared.key}", declared.default)
        cls.SETTINGS = settings
        cls.NODES = {name: node for part in reversed(cls.__mro__) for name, node in vars(part).get("NODES", {}).items()}

    @classmethod
    def default_node(cls) -> CfgNode:
        """Returns the YAML node with all defaults."""
        node = CfgNode({declared.key: copy.copy(declared.default) for declared in cls.SETTINGS.values()})
        node.update({name: part.default_node() for name, part in cls.NODES.items()})
        return node

    @classmethod
    def list_keys(cls, where: str) -> Iterator[tuple[str, Setting]]:
        """Yields each whole key with its declaration, given the node's own key."""
        yield from ((f"{where}.{declared.key}", declared) for declared in cls.SETTINGS.values())
        for name, part in cls.NODES.items():
            yield from part.list_keys(f"{where}.{name}")

    @classmethod
    def arguments(cls, node: CfgNode) -> dict[str, Any]:
        """Returns the constructor's arguments that a YAML node holds."""
        return {name: node[declared.key] for name, declared in cls.SETTINGS.items() if not declared.config_only}

    def configure(self, given: Mapping[str, Any], where: str) -> None:
        """Sets every setting as an attribute: what is given, else its default.

        Args:
            given: by attribute, as a constructor gets them.
            where: the YAML node, for messages.

        Raises:
            ConfigError: a value has another type than its default, or is out of range.
            TypeError: there is no such setting.
        """
        settings = {name: declared for name, declared in self.SETTINGS.items() if not declared.config_only}
        for name in given:
            if name not in settings:
                raise TypeError(f"{type(self).__name__} has no argument {name!r}.{did_you_mean(name, settings)}")
        for name, declared in settings.items():
            value = declared.check(f"{where}.{declared.key}", given.get(name, declared.default))
            setattr(self, name, copy.copy(value))


def _declared_in(part: type) -> dict[str, Setting]:
    """The settings that a class declares itself, with their keys; annotated as float, a whole number is a float."""
    annotations, settings = inspect.get_annotations(part), {}
    for name, declared in vars(part).items():
        if isinstance(declared, Setting):
            _check_name(part, name)
            is_float = annotations.get(name) in (float, "float") and type(declared.default) is int
            default = float(declared.default) if is_float else declared.default
            settings[name] = replace(declared, key=declared.key or name.upper(), default=default)
    return settings


def _check_name(cls: type, name: str) -> None:
    """Raises TypeError where an attribute of a base class has the name of a setting."""
    if name.startswith("_"):
        raise TypeError(f"{cls.__name__}.{name} cannot be a setting: its name begins with an underscore.")
    for base in cls.__mro__[1:]:
        taken = name in vars(base) or name in inspect.get_annotations(base)
        if taken and not isinstance(vars(base).get(name), Setting):
            raise TypeError(f"{cls.__name__}.{name} cannot be a setting: {base.__name__}.{name} is something else.")
