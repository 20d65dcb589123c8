"""Images that are in a dataset twice, or in two datasets."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence

#: Bytes of a file that are compared, beside its length.
_HEAD = 2**18


def equal_files(datasets: Mapping[str, Sequence[str]]) -> list[list[tuple[str, str]]]:
    """Returns groups of (dataset, file) whose files have one content, in the order in which they are given.

    One file that is listed twice by a dataset counts once. Files are compared by length and their first 256 KiB; of
    images that is enough.

    Args:
        datasets: the image files of each.
    """
    by_length: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for name, files in datasets.items():
        for file in dict.fromkeys(files):
            if os.path.isfile(file):
                by_length[os.path.getsize(file)].append((name, file))
    by_content: dict[tuple[int, bytes], list[tuple[str, str]]] = defaultdict(list)
    for length, entries in by_length.items():
        if len(entries) > 1:
            for entry in entries:
                by_content[length, _digest(entry[1])].append(entry)
    return [entries for entries in by_content.values() if len(entries) > 1]


def _digest(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.blake2b(file.read(_HEAD), digest_size=16).digest()
