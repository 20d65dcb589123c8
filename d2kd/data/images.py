"""Image files: what is wrong with one, told before it is used; label maps, read alike for training and evaluation."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from d2kd.files import describe_foreign_file
from detectron2.utils.file_io import PathManager

logger = logging.getLogger(__name__)

_EXIF_ORIENTATION = 0x0112
#: How the formats end whose cut files are told apart by it.
_ENDINGS = {"PNG": b"IEND", "JPEG": b"\xff\xd9"}
#: Bytes at the end of a file in which its ending must be.
_TAIL = 64

#: (width, height)
Size = tuple[int, int]


def image_problem(path: str, size: Size | None = None, *, decode: bool = False) -> str | None:
    """Returns what is wrong with an image file, in a sentence; None for nothing.

    Args:
        path: that the path manager knows.
        size: that it must have when shown upright.
        decode: look at all pixels, and not at the first and last bytes only.
    """
    return _problem("Image", path, lambda image: _depth_problem(path, image) or _size_problem(image, size), decode)


def label_map_problem(path: str, size: Size | None = None, *, decode: bool = False) -> str | None:
    """Returns what is wrong with a label map, as `image_problem` does."""
    return _problem("Label map", path, lambda image: _label_problem(image) or _size_problem(image, size), decode)


def read_label_map(path: str, dtype: Any = None) -> np.ndarray:
    """Reads a label map: grey values, or the indices of a palette, are classes.

    Args:
        path: that the path manager knows.
        dtype: of the result; None keeps the file's.

    Returns:
        (H, W), upright.

    Raises:
        ValueError: it has colors (its palette, if any, was applied), which stand for no class.
    """
    with PathManager.open(path, "rb") as file, Image.open(file) as image:
        problem = _label_problem(image)
        if problem:
            raise ValueError(f"Label map {path} {problem}.")
        return np.array(ImageOps.exif_transpose(image), dtype=dtype)


def _problem(what: str, path: str, look: Callable[[Image.Image], str | None], decode: bool) -> str | None:
    name = f"{what} {path if path.isprintable() else repr(path)}"
    try:
        with PathManager.open(path, "rb") as file, Image.open(file) as image:
            if decode:
                image.load()
            found = look(image)
            if found is None and _looks_cut(file, image):
                image.load()
    except MemoryError:
        raise
    # Decoders raise all kinds of exceptions on damaged files; each means the same here.
    except Exception as error:
        return f"{name} cannot be read ({describe_foreign_file(path) or _reason(error)})."
    return f"{name} {found}." if found else None


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its message is the path again
        return "its content is that of no known image format"
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _looks_cut(file: Any, image: Image.Image) -> bool:
    """Whether a file lacks its format's ending; some whole ones do, so this is a suspicion only."""
    ending = _ENDINGS.get(image.format or "")
    if ending is None:
        return False
    position = file.tell()
    end = file.seek(0, 2)
    file.seek(max(0, end - _TAIL))
    tail = file.read()
    file.seek(position)
    return ending not in tail


def _depth_problem(path: str, image: Image.Image) -> str | None:
    if image.mode.startswith(("I", "F")):
        kind = "floating-point" if image.mode == "F" else "16-bit" if ";16" in image.mode else "32-bit"
        return (
            f"has {kind} pixels (mode {image.mode}), whose range is unknown: convert all images to 8 bits by one scale"
        )
    if any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())) and path not in _told_depth:
        if not _told_depth:
            logger.warning("Image %s has 16 bits a channel; of such images the upper 8 bits are used.", path)
        _told_depth.add(path)
    return None


_told_depth: set[str] = set()


def _label_problem(image: Image.Image) -> str | None:
    if image.mode in ("L", "P", "1") or image.mode.startswith("I"):
        return None
    return (
        f"has colors or floats (mode {image.mode}), and must have one whole number a pixel, the class: store indices, "
        "grey or with a palette"
    )


def _size_problem(image: Image.Image, size: Size | None) -> str | None:
    if image.format == "PNG" and size == image.size[::-1] != image.size:
        image.load()  # the tag may stand behind the pixels
    orientation = _orientation(image)
    upright = image.size[::-1] if orientation in (5, 6, 7, 8) else image.size
    if size is None or size == upright:
        return None
    text = f"is {upright[0]} x {upright[1]} (width x height), but the annotations say {size[0]} x {size[1]}"
    if size == upright[::-1]:
        cause = f"by its EXIF orientation {orientation}" if upright != image.size else "in the annotations"
        text += f": width and height are swapped {cause}"
        if upright != image.size:
            text += ". List the size of the image as it is shown, with boxes that fit, or remove the tag"
    return text


def _orientation(image: Image.Image) -> int | None:
    try:
        # that of PNG files decodes them, and damage goes unnoticed the second time
        return Image.Image.getexif(image).get(_EXIF_ORIENTATION)
    except Exception:  # a damaged block of EXIF data has no orientation
        return None
