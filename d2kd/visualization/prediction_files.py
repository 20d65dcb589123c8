"""Files of predictions, as evaluators write them: lists in JSON, checked entry by entry."""

import json
from collections.abc import Callable, Mapping
from typing import Any

#: What the value of a key must be, by the key.
Checks = Mapping[str, Callable[[Any], bool]]


def read_entries(path: str, required: Checks, optional: Checks | None = None) -> list[dict[str, Any]]:
    """Reads a JSON list of objects.

    Args:
        path: the file.
        required: keys that every entry has.
        optional: keys that entries may have, or have as null.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such list; the message names the first entry, from 0, and its key.
    """
    with open(path, encoding="utf-8") as file:
        entries = json.load(file)
    if not isinstance(entries, list):
        raise ValueError("it holds no list")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"entry {number} is {entry!r:.40}, not a prediction")
        for key, fits in required.items():
            if key not in entry:
                raise ValueError(f"entry {number} has no {key!r}")
            if not fits(entry[key]):
                raise ValueError(f"entry {number} has {key!r} {entry[key]!r:.40}")
        for key, fits in (optional or {}).items():
            if entry.get(key) is not None and not fits(entry[key]):
                raise ValueError(f"entry {number} has {key!r} {entry[key]!r:.40}")
    return entries


def is_id(value: Any) -> bool:
    """Whether a value can be the id of an image."""
    return isinstance(value, (int, str))


def is_name(value: Any) -> bool:
    """Whether a value is a text."""
    return isinstance(value, str)


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number."""
    return isinstance(value, int)


def is_number(value: Any) -> bool:
    """Whether a value is a number; NaN is one, as diverged models give it."""
    return isinstance(value, (int, float))


def is_box(value: Any) -> bool:
    """Whether a value is four numbers."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def is_list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Returns a check of lists, all of whose items pass one."""
    return lambda value: isinstance(value, list) and all(map(fits, value))


def is_rle(value: Any) -> bool:
    """Whether a value is a run-length encoded mask, compressed or not."""
    if not isinstance(value, dict):
        return False
    size, counts = value.get("size") or (), value.get("counts")
    return is_list_of(is_whole)(size) and len(size) == 2 and isinstance(counts, (str, list))


def is_points(value: Any) -> bool:
    """Whether a value is a list of [x, y]."""
    return is_list_of(lambda point: is_list_of(is_number)(point) and len(point) == 2)(value)
