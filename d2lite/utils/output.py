"""Writes files so that a file under its final name is always complete."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def complete_file(path: str) -> Iterator[str]:
    """Yields a temporary name to write to, which becomes `path` at the end unless there is an error."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.tmp-{os.getpid()}"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_json(path: str, content: Any) -> None:
    """Writes `content` as JSON."""
    with complete_file(path) as temporary, open(temporary, "w") as file:
        json.dump(content, file)
