"""Files of a folder and of those below it, by which images and what belongs to them are paired."""

import os
from collections.abc import Callable, Sequence

#: Endings of image files, in any case.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


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
    for folder, below, names in os.walk(root, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            stem, ending = os.path.splitext(name)
            if name.startswith(".") or ending.lower() not in endings or not stem.endswith(suffix):
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
