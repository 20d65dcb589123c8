"""timm's policies: checks of the strings, of which it leaves out some that it does not know, and a repair."""

import re
from collections.abc import Callable
from typing import Any

from PIL import Image

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


def allow_no_bits(transform: Any) -> None:
    """Lets the strongest posterization of a policy make a black image, as it always did.

    timm asks Pillow for 0 bits then, which newer versions of Pillow refuse, in the middle of a training.

    Args:
        transform: timm's, with or without a policy in it; it is changed.
    """
    from timm.data.auto_augment import posterize  # slow, and of no use to detectors

    for part in transform.transforms:
        nested = [op for steps in getattr(part, "policy", ()) for op in steps]
        for op in [*getattr(part, "ops", ()), *nested]:
            if op.aug_fn is posterize:
                op.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    from timm.data.auto_augment import posterize

    if bits < 1:
        return Image.new(image.mode, image.size)
    posterized: Image.Image = posterize(image, bits, **options)
    return posterized
