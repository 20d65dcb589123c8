"""Names of methods, models and keys, kept in names.json: so that a list, or a hint at a typing error, takes no time.

The file holds for d2kd as it is, on its own runtime. Where anything else is registered (by installed packages, by
Detectron2, or in sources that have changed), there is no table, and everything is imported.
"""

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from d2kd.plugins import ENTRY_POINT_GROUP
from d2kd.runtime import is_d2lite

#: Lines of help by what is listed, then by name.
Names = Mapping[str, dict[str, str]]

_PACKAGE = Path(__file__).parents[1]


@functools.cache
def kept_table() -> dict[str, Any] | None:
    """Returns what names.json holds, "names" and "keys"; None where it does not hold here."""
    if not is_d2lite() or entry_points(group=ENTRY_POINT_GROUP):
        return None
    try:
        table: dict[str, Any] = json.loads((_PACKAGE / "cli" / "names.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return table if table["registrations"] == registrations() else None


def registrations() -> str:
    """Returns a checksum of all lines of d2kd that register something, each with the one below it."""
    lines = re.findall(r"^.*(?:\.register|register_architecture)\(.*\n.*", source(), re.MULTILINE)
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


@functools.cache
def source() -> str:
    """Returns the source of d2kd."""
    return "".join(path.read_text(encoding="utf-8") for path in sorted(_PACKAGE.rglob("*.py")))


def first_sentence(text: str) -> str:
    """Returns the first sentence, without its dot; a dot ends none within a word, or before a number."""
    return re.split(r"\.\s+(?=[A-Z`])", text)[0].removesuffix(".")
