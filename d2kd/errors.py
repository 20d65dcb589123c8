"""Errors that a user can put right: one line that says what is wrong, where, and what to do; never a traceback."""

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """Base of every error whose message says all; programs show it as one line and end with status 2."""


class ConfigError(UserError):
    """A configuration file, key, value or flag that cannot be used."""


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Returns " Did you mean A or B?" with the nearest of the known words, whatever their case; "" without any."""
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(word).lower(), by_lower, n=3, cutoff=cutoff)
    return f" Did you mean {' or '.join(by_lower[name] for name in near)}?" if near else ""


def require_choice(key: str, value: Any, choices: Iterable[Any], hint: str = "") -> None:
    """Checks a value that must be one of some words, or numbers.

    Args:
        key: the whole key, for the message.
        hint: what else to say, " ...", at its end.

    Raises:
        ConfigError: it is none of them; the message lists them, and near matches.
    """
    choices = list(choices)
    if value not in choices:
        words = [str(choice) or '""' for choice in choices]
        near = did_you_mean(value, words)
        raise ConfigError(f"{key} is {value!r}; it must be one of {', '.join(words)}.{near}{hint}")
