"""Files of a folder and of those below it, by which images and what belongs to them are paired."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from d2kd.errors import did_you_mean

#: Endings of image files, in any case.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """Yields a folder, then those below it, each with the names of its files, sorted; hidden ones are left out.

    Links are followed, but not back to a folder that they lie in.
    """
    yield from _walk(root, ())


def _walk(folder: str, above: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    real = os.path.realpath(folder)
    if leads_back(real, above):
        return
    below: list[str] = []
    names: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    (below if is_folder(entry) else names).append(entry.name)
    except OSError:  # it may not be read
        return
    yield folder, sorted(names)
    for name in sorted(below):
        yield from _walk(os.path.join(folder, name), (*above, real))


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Returns whether an entry is a folder, or a link to one; not for links to themselves, at which `is_dir` fails."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def leads_back(real: str, above: Sequence[str]) -> bool:
    """Returns whether a folder is one of those that led to it, or holds one of them; all without links."""
    return any(folder == real or folder.startswith(real.rstrip(os.sep) + os.sep) for folder in above)


def files_by_key(
    root: str, endings: Sequence[str], what: str, error: Callable[[str], Exception], suffix: str = ""
) -> dict[str, str]:
    """Returns paths by their path in the folder, without ending and suffix; hidden files are left out.

    Args:
        root: the folder.
        endings: of files that count, in lower case.
        what: they are, for messages.
        error: makes an error of a message.
        suffix: what names have before their ending, and keys have not.

    Raises:
        Exception: by `error`; there is no such folder, it holds no such file, or two that differ in their endings only.
    """
    if not os.path.isdir(root):
        raise error(f"{root}, which should hold the {what}, is no folder.")
    found: dict[str, str] = {}
    for folder, names in walk(root):
        for name in names:
            stem, ending = os.path.splitext(name)
            if ending.lower() not in endings or not stem.endswith(suffix):
                continue
            key = os.path.relpath(os.path.join(folder, stem.removesuffix(suffix)), root)
            if key in found:
                other = os.path.basename(found[key])
                raise error(f"{other} and {name} in {folder} have one name: keep one of them.")
            found[key] = os.path.join(folder, name)
    if not found:
        behind = f" with {suffix!r} before their endings" if suffix else ""
        raise error(f"{root} holds no {what} ({', '.join(endings)}){behind}.")
    return found


def near_name(name: str, others: Iterable[str], cutoff: float = 0.5) -> str:
    """Returns " Did you mean A or B?" with the nearest names that have the same numbers.

    000001 and 000071 are two files, and no typing error; 1 and 01 may be one.
    """
    return did_you_mean(name, [other for other in others if _numbers(other) == _numbers(name)], cutoff)


def _numbers(name: str) -> list[int]:
    return [int(digits) for digits in re.findall("[0-9]+", name)]
