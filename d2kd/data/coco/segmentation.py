"""Segmentations of COCO: polygons [[x, y, x, y, ...], ...], or runs {"size": [h, w], "counts": ...} ("RLE")."""

import functools
import re
from itertools import accumulate
from typing import Any

import pycocotools.mask as mask_util

#: Numbers a polygon needs: three points.
_MIN_NUMBERS = 6
_POINTS = "is a list of points [x, y]: COCO's polygons are [x, y, x, y, ...]"


class SegmentationError(ValueError):
    """A segmentation that no mask can be made of; the message completes "its segmentation ..."."""


def usable_segmentation(value: Any, height: int, width: int) -> Any:
    """Returns what of a segmentation a mask can be made of: its polygons of three points or more, or its runs.

    Args:
        value: of the key "segmentation"; None where there is none.
        height, width: of the image.

    Raises:
        SegmentationError: nothing is left, or a part of it would crash or mislead what draws masks.
    """
    if isinstance(value, list) and value:
        return _usable_polygons(value, max(height, width))
    if isinstance(value, dict):
        _check_runs(value, height, width)
        return value
    raise SegmentationError(f"is a {type(value).__name__}" if value else "is missing" if value is None else "is empty")


def as_runs(value: Any, height: int, width: int) -> dict[str, Any]:
    """Returns the mask of a segmentation as compressed RLE; arguments and errors as in `usable_segmentation`."""
    usable = usable_segmentation(value, height, width)
    if isinstance(usable, list):
        return mask_util.merge(mask_util.frPyObjects(usable, height, width))
    return mask_util.frPyObjects(usable, height, width) if isinstance(usable["counts"], list) else usable


def _usable_polygons(polygons: list[Any], side: int) -> list[list[float]]:
    whole = True
    for polygon in polygons:
        if type(polygon) is not list:
            if type(polygon) in (int, float):
                raise SegmentationError("is a flat list of numbers: put it into another pair of brackets")
            kind = type(polygon).__name__
            raise SegmentationError(f"has a {kind} where a polygon [x, y, x, y, ...] must be")
        length = len(polygon)
        if length < _MIN_NUMBERS or length % 2:
            whole = False
        if not length:
            continue
        try:
            total, low, high = sum(polygon), min(polygon), max(polygon)
        except (TypeError, OverflowError):
            raise SegmentationError(_describe_item(polygon)) from None
        # a far corner takes as much memory to draw as there are pixels up to it; NaN compares as false
        if not (low >= -side and high <= 2 * side and total == total):
            raise SegmentationError("has a coordinate that is not finite or far outside the image")
    usable = polygons if whole else [p for p in polygons if len(p) >= _MIN_NUMBERS and len(p) % 2 == 0]
    if not usable:
        if len(polygons) > 2 and all(len(p) == 2 for p in polygons):
            raise SegmentationError(_POINTS)
        few = all(len(p) < _MIN_NUMBERS for p in polygons)
        raise SegmentationError("has fewer than three points" if few else "has an odd number of coordinates")
    return usable


def _describe_item(polygon: list[Any]) -> str:
    item = next((item for item in polygon if type(item) not in (int, float)), None)
    if isinstance(item, list):
        return _POINTS
    return f"has a {type(item).__name__} where a coordinate must be"


def _check_runs(rle: dict[str, Any], height: int, width: int) -> None:
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, list) or [type(n) for n in size] != [int, int] or not isinstance(counts, (list, str)):
        raise SegmentationError('is a dict, and no RLE {"size": [height, width], "counts": a list or a string}')
    if size != [height, width]:
        swapped = " (height and width are swapped)" if size == [width, height] else ""
        raise SegmentationError(f"has the size {size}, and its image is [{height}, {width}]{swapped}")
    runs = counts if isinstance(counts, list) else _decode_runs(counts)
    if not set(map(type, runs)) <= {int} or min(runs, default=0) < 0:
        raise SegmentationError("has runs that are no numbers of pixels")
    if sum(runs) != height * width:
        raise SegmentationError(f"has runs of {sum(runs)} pixels in all, and its image has {height * width}")


def _decode_runs(text: str) -> list[int]:
    """The lengths of runs in COCO's compressed form: from the fourth on differences to the run before the last."""
    numbers = _NUMBER.findall(text)
    if sum(map(len, numbers)) != len(text):
        cut = _NUMBER.fullmatch(text[-1] + "0") is not None
        raise SegmentationError(
            f"has counts that {'end in the middle of a number' if cut else 'are no compressed RLE'}"
        )
    runs = [*map(_read_number, numbers)]
    runs[1::2], runs[2::2] = accumulate(runs[1::2]), accumulate(runs[2::2])
    return runs


# groups of 5 bits a character from "0" on, the lowest first; bit 6 says that another follows
_NUMBER = re.compile("[P-o]{0,12}[0-O]")


@functools.lru_cache(2**14)
def _read_number(text: str) -> int:
    groups = [ord(character) - 48 for character in text]
    value = sum((group & 31) << 5 * i for i, group in enumerate(groups))
    return value - (1 << 5 * len(groups)) if groups[-1] & 16 else value
