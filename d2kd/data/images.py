"""Image files: what is wrong with one, told before it is used; label maps, read alike for training and evaluation."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from d2kd.errors import UserError
from d2kd.files import describe_foreign_file
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager

logger = logging.getLogger(__name__)

_EXIF_ORIENTATION = 0x0112
#: Orientations by which width and height are swapped.
_SIDEWAYS = (5, 6, 7, 8)
#: Pillow turns these upright when it loads them; the tag, and the size until then, are those of before or after,
#: depending on its version.
_TURNED_BY_LOADING = "TIFF"
#: How the formats end whose cut files are told apart by it.
_ENDINGS = {"PNG": b"IEND", "JPEG": b"\xff\xd9"}
#: Bytes at the end of a file in which its ending must be.
_TAIL = 64

#: (width, height)
Size = tuple[int, int]


class LabelMapError(UserError):
    """A label map that cannot be used; the message says which one, and why."""


class LabelRange(NamedTuple):
    """Labels that stand for something: 0 to `num_classes` - 1, and the one that is ignored."""

    num_classes: int
    ignored: int | None


def image_problem(path: str, size: Size | None = None, *, decode: bool = False) -> str | None:
    """Returns what is wrong with an image file, in a sentence; None for nothing.

    Args:
        path: that the path manager knows.
        size: that it must have when shown upright.
        decode: look at all pixels, and not at the first and last bytes only.
    """

    def look(image: Image.Image) -> str | None:
        return _depth_problem(path, image) or _size_problem(image, size, "the annotations say")

    return _problem("Image", path, look, decode)


def label_map_problem(path: str, size: Size | None = None, *, decode: bool = False) -> str | None:
    """Returns what is wrong with a label map, as `image_problem` does; `size` is that of its image."""
    return _problem(
        "Label map", path, lambda image: _label_problem(image) or _size_problem(image, size, "its image is"), decode
    )


def read_image(path: str, format: str) -> np.ndarray:
    """Reads an image as Detectron2 does, but never in part: damage within a file is an error.

    Args:
        path: that the path manager knows.
        format: of `INPUT.FORMAT`.

    Returns:
        (H, W, C), upright.
    """
    with PathManager.open(path, "rb") as file, Image.open(file) as image:
        image.load()  # what asks for EXIF data hides what fails here, and the pixels so far are taken
        return detection_utils.convert_PIL_to_numpy(_upright(image), format)


def read_rgb(path: str) -> Image.Image:
    """Reads an image for augmentations that work on Pillow's images, in whole as `read_image` does.

    Args:
        path: that the path manager knows.

    Returns:
        In mode RGB, upright.

    Raises:
        ValueError: its pixels have no known range; `image_problem` says why.
    """
    with PathManager.open(path, "rb") as file, Image.open(file) as image:
        problem = _depth_problem(path, image)
        if problem is not None:
            raise ValueError(problem)
        image.load()
        upright = _upright(image)
        return upright if upright.mode == "RGB" else upright.convert("RGB")  # which would copy


def frame_image(frame: np.ndarray) -> Image.Image:
    """Returns a frame of a video, uint8 (H, W, 3) BGR, as Pillow's image in mode RGB."""
    return Image.fromarray(np.ascontiguousarray(frame[:, :, ::-1]))


def read_label_map(path: str, dtype: Any = None, labels: LabelRange | None = None) -> np.ndarray:
    """Reads a label map: grey values, or the indices of a palette, are classes.

    Args:
        path: that the path manager knows.
        dtype: of the result; None keeps the file's, and has uint8 for 1 bit.
        labels: that it may have.

    Returns:
        (H, W), upright.

    Raises:
        LabelMapError: it cannot be read, has colors (its palette, if any, was applied), or has other labels.
    """
    found = []

    def read(image: Image.Image) -> str | None:
        problem = _label_problem(image)
        if problem is None:
            image.load()
            values = np.array(_upright(image), dtype=dtype)
            found.append(values.astype(np.uint8) if values.dtype == bool else values)
            problem = None if labels is None else _range_problem(found[0], labels)
        return problem

    problem = _problem("Label map", path, read, decode=False)
    if problem:
        raise LabelMapError(problem)
    return found[0]


def image_size(path: str) -> Size:
    """Returns the size of an image file when shown upright."""
    with PathManager.open(path, "rb") as file, Image.open(file) as image:
        return _upright_size(image)


def _problem(what: str, path: str, look: Callable[[Image.Image], str | None], decode: bool) -> str | None:
    name = f"{what} {path if path.isprintable() else repr(path)}"
    if not PathManager.isfile(path):  # a pipe would be waited for
        return f"{name} cannot be read (there is no such file)."
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


def _range_problem(found: np.ndarray, labels: LabelRange) -> str | None:
    wrong = (found < 0) | (found >= labels.num_classes)
    if labels.ignored is not None:
        wrong &= found != labels.ignored
    if not wrong.any():
        return None
    return (
        f"has the label {found[wrong][0]}, and there are {labels.num_classes} classes, from 0 on; "
        f"{'no label' if labels.ignored is None else labels.ignored} is ignored"
    )


def _size_problem(image: Image.Image, size: Size | None, whose: str) -> str | None:
    if image.format == "PNG" and size == image.size[::-1] != image.size:
        image.load()  # the tag may stand behind the pixels
    orientation = _orientation(image)
    upright = _upright_size(image)
    if size is None or size == upright:
        return None
    text = f"is {upright[0]} x {upright[1]} (width x height), but {whose} {size[0]} x {size[1]}"
    if size != upright[::-1]:
        return text
    if orientation not in _SIDEWAYS:
        return f"{text}: width and height are swapped"
    return (
        f"{text}: width and height are swapped by its EXIF orientation {orientation}. List the size of the "
        "image as it is shown, with boxes that fit, or remove the tag"
    )


def _upright(image: Image.Image) -> Image.Image:
    """The image upright; it is loaded."""
    if image.format == _TURNED_BY_LOADING or _orientation(image) is None:
        return image
    return ImageOps.exif_transpose(image)


def _upright_size(image: Image.Image) -> Size:
    if _orientation(image) not in _SIDEWAYS:
        return image.size
    if image.format == _TURNED_BY_LOADING:
        image.load()
        return image.size
    return image.size[::-1]


def _orientation(image: Image.Image) -> int | None:
    try:
        # that of PNG files decodes them, and damage goes unnoticed the second time
        return Image.Image.getexif(image).get(_EXIF_ORIENTATION)
    except Exception:  # a damaged block of EXIF data has no orientation
        return None
