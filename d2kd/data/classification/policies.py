"""Checks of timm's policy strings: of what it does not know it leaves out some, and fails at others."""

import re
from collections.abc import Callable
from typing import Any

from d2kd.errors import ConfigError, did_you_mean

#: What may follow the name of a policy, by its name: letters that a number follows.
_SECTIONS = {
    "rand": ("m", "n", "p", "mstd", "mmax", "inc"),
    "augmix": ("m", "w", "d", "a", "b", "mstd"),
    "v0": ("mstd",),
    "v0r": ("mstd",),
    "original": ("mstd",),
    "originalr": ("mstd",),
    "3a": ("mstd",),
}
#: Sets of operations that `rand` may draw from.
_SETS = ("tweights", "t3a", "t3aw")


def check_policy(key: str, policy: str, build: Callable[[], Any]) -> None:
    """Checks a policy, word by word and then by building it.

    Args:
        key: the whole key, for the message.
        policy: such as "rand-m9-mstd0.5-inc1"; "" is none.
        build: builds what the policy says, by timm.

    Raises:
        ConfigError: timm does not know it, or a part of it.
    """
    if not policy:
        return
    name, *sections = policy.split("-")
    if name not in _SECTIONS:
        raise ConfigError(
            f"{key} is {policy!r}; a policy begins with one of {', '.join(_SECTIONS)}.{did_you_mean(name, _SECTIONS)}"
        )
    for section in sections:
        letters = re.fullmatch(r"([a-z]+)\d+(\.\d+)?", section)
        known = (letters is not None and letters[1] in _SECTIONS[name]) or (name == "rand" and section in _SETS)
        if not known:
            raise ConfigError(
                f"{key} is {policy!r}: after {name!r}, {section!r} means nothing. There may be "
                f"{', '.join(_SECTIONS[name])} with a number{', ' + ', '.join(_SETS) if name == 'rand' else ''}."
            )
    try:
        build()
    except Exception as error:  # assertions, key and value errors of all kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{key} is {policy!r}, which timm does not take ({reason}).") from error
