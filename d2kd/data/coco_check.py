"""Checks a COCO annotation file before any training time is spent on it."""

import contextlib
import gc
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from d2kd.errors import UserError
from detectron2.utils.file_io import PathManager

__all__ = ["CocoSummary", "DatasetError", "validate_coco_json"]

logger = logging.getLogger(__name__)

# How far a box may reach out of its image, in pixels; annotation tools round.
BOX_TOLERANCE = 1.0

_ID, _NUMBER = (int, str), (int, float)
_TYPES: dict[str, dict[str, tuple[type, ...]]] = {
    "images": {"id": _ID, "file_name": (str,), "height": _NUMBER, "width": _NUMBER},
    "annotations": {"id": _ID, "image_id": _ID, "category_id": (int,), "bbox": (list,)},
    "categories": {"id": (int,), "name": (str,)},
}

Entries = list[dict[str, Any]]


class DatasetError(UserError):
    """Something is wrong with a dataset; the message says what, where, and what to do."""


class CocoSummary(NamedTuple):
    """What a COCO file holds."""

    num_images: int
    num_annotations: int
    class_names: list[str]  # in the order of the category ids


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    """Switches the garbage collector off: it would scan millions of new objects again and again."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@_without_gc()
def validate_coco_json(
    path: str,
    image_root: str | None = None,
    *,
    need_annotations: bool = True,
    missing_images: str = "error",
) -> CocoSummary:
    """Checks that a file is a sound COCO instances file.

    Boxes without a positive width and height are a warning only (COCO itself has some).

    Args:
        path: the annotation file.
        image_root: folder of the images; if given, every listed image must be there.
        need_annotations: whether a file without "annotations" (an image list) is an error.
        missing_images: "error", or "warn" where training leaves out images that cannot be read.

    Returns:
        how many images, annotations and classes it has.

    Raises:
        DatasetError: at the first thing that is wrong.
    """
    content = _read_json(path)
    required = [section for section in _TYPES if need_annotations or section != "annotations"]
    images, annotations, categories = _sections(path, content, required)
    _check_entries(path, "images", images)
    _check_entries(path, "annotations", annotations)
    _check_entries(path, "categories", categories)
    _check_unique(path, "images", images)
    _check_unique(path, "categories", categories)
    # Detectron2 admits the repeated annotation ids of COCO's 2014 minival files; so does this.
    if "minival" not in os.path.basename(path):
        _check_unique(path, "annotations", annotations)
    _check_listed(path, annotations, "image_id", "images", images)
    _check_listed(path, annotations, "category_id", "categories", categories)
    if annotations:
        _check_boxes(path, images, annotations)
    if image_root is not None:
        _check_image_files(path, images, image_root, missing_images)
    names = [c["name"] for c in sorted(categories, key=lambda c: c["id"])]
    return CocoSummary(len(images), len(annotations), names)


def _read_json(path: str) -> Any:
    """The content of a JSON file."""
    if not PathManager.isfile(path):
        what = "is a directory, not a file" if PathManager.isdir(path) else "does not exist"
        raise DatasetError(f"Annotation file {path} {what}. Correct the path.")
    try:
        with PathManager.open(path, "r", encoding="utf-8") as f:
            return json.load(f)
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise DatasetError(f"{path} is not JSON ({e}). Is it complete, and the annotation file?") from e
    except OSError as e:
        raise DatasetError(f"Annotation file {path} cannot be read ({e}).") from e


def _sections(path: str, content: Any, required: Sequence[str]) -> list[Entries]:
    """The lists "images", "annotations" and "categories"; one that is not required may be missing."""
    if not isinstance(content, dict):
        raise DatasetError(
            f"{path} is not in COCO format: its top level is a {type(content).__name__}, not an object with "
            "images, annotations and categories."
        )
    for key in required:
        if key not in content:
            raise DatasetError(
                f"{path} is not in COCO format: it has no {key!r} (it has {sorted(content)[:8]}). Use an instances "
                "file with images, annotations and categories."
            )
    sections = [content.get(key, []) for key in _TYPES]
    for key, entries in zip(_TYPES, sections):
        if not isinstance(entries, list):
            raise DatasetError(f"{path} is not in COCO format: {key!r} is a {type(entries).__name__}, not a list.")
    if not sections[0]:
        raise DatasetError(f"{path} lists no images. Use a file that has some.")
    return sections


def _check_entries(path: str, section: str, entries: Entries) -> None:
    """Every entry must be an object whose keys have the types of the format; sizes must be positive."""
    for key, allowed in _TYPES[section].items():
        try:
            values = [entry[key] for entry in entries]
        except (KeyError, TypeError):
            _raise_malformed(path, section, entries)
        is_size = key in ("height", "width")
        # Whole columns first: only a column that is wrong is searched.
        if {type(v) for v in values} <= set(allowed) and not (is_size and values and min(values) <= 0):
            continue
        wrong = (type(v) not in allowed or (is_size and v <= 0) for v in values)
        i = next(i for i, is_wrong in enumerate(wrong) if is_wrong)
        raise DatasetError(
            f"{path} is not in COCO format: {section}[{i}]{_id_of(entries[i])} has {key} = {values[i]!r}. It must be "
            f"of type {' or '.join(t.__name__ for t in allowed)}{' and positive' if is_size else ''}."
        )


def _raise_malformed(path: str, section: str, entries: Entries) -> NoReturn:
    """Names the first entry that is no object or lacks a key."""
    keys = _TYPES[section].keys()
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict) or not keys <= entry.keys():
            has = f"lacks {sorted(keys - entry.keys())}" if isinstance(entry, dict) else f"is {entry!r:.40}"
            raise DatasetError(
                f"{path} is not in COCO format: {section}[{i}]{_id_of(entry)} {has}. Each needs {', '.join(keys)}."
            )
    raise AssertionError("called for entries that are well-formed")


def _id_of(entry: Any) -> str:
    return f" (id {entry['id']})" if isinstance(entry, dict) and "id" in entry else ""


def _check_unique(path: str, section: str, entries: Entries) -> None:
    """Ids must differ."""
    ids = [e["id"] for e in entries]
    if len(set(ids)) == len(ids):
        return
    seen: set[Any] = set()
    twice = []
    for i in ids:
        if i in seen:
            twice.append(i)
        seen.add(i)
    raise DatasetError(
        f"{path}: {len(twice)} of the {len(ids)} {section} repeat an id, first id {twice[0]}. Give each its own id."
    )


def _check_listed(path: str, annotations: Entries, key: str, section: str, entries: Entries) -> None:
    """What annotations refer to must be listed."""
    known = {e["id"] for e in entries}
    wrong = [a for a in annotations if a[key] not in known]
    if wrong:
        raise DatasetError(
            f"{path}: {len(wrong)} of {len(annotations)} annotations have a {key} that is not listed under "
            f"{section}, first annotation{_id_of(wrong[0])} with {key} {wrong[0][key]}. List it, or remove the "
            "annotations."
        )


def _check_boxes(path: str, images: Entries, annotations: Entries) -> None:
    """Boxes must lie inside their image."""
    boxes = _box_array(path, annotations)
    size_of = {image["id"]: (image["width"], image["height"]) for image in images}
    sizes = np.array([size_of[a["image_id"]] for a in annotations], dtype=float)
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    outside = (low < -BOX_TOLERANCE).any(1) | (high > sizes + BOX_TOLERANCE).any(1)
    if outside.any():
        first = int(outside.argmax())
        anno = annotations[first]
        name = next(image["file_name"] for image in images if image["id"] == anno["image_id"])
        width, height = size_of[anno["image_id"]]
        raise DatasetError(
            f"{path}: {int(outside.sum())} of {len(annotations)} boxes lie outside their image by more than "
            f"{BOX_TOLERANCE:g} px, first annotation{_id_of(anno)} with bbox {anno['bbox']} in {name}, which is "
            f"{width} x {height} (width x height). COCO boxes are [x, y, width, height] in pixels: correct them."
        )
    empty = (boxes[:, 2:] <= 0).any(1)
    if empty.any():
        logger.warning(
            f"{path}: {int(empty.sum())} boxes have no positive width and height, first annotation"
            f"{_id_of(annotations[int(empty.argmax())])}; they are left out in training"
        )


def _box_array(path: str, annotations: Entries) -> np.ndarray:
    """All boxes (N, 4), as [x, y, width, height]."""
    try:
        boxes = np.array([a["bbox"] for a in annotations])
        if boxes.shape == (len(annotations), 4) and boxes.dtype.kind in "if" and np.isfinite(boxes).all():
            return boxes.astype(float, copy=False)
    except ValueError:
        pass  # Lists of different lengths; the first wrong one is named below.
    wrong = next((a for a in annotations if not _is_box(a["bbox"])), annotations[0])
    raise DatasetError(
        f"{path}: annotation{_id_of(wrong)} of image {wrong['image_id']} has bbox {wrong['bbox']}. It must be "
        "[x, y, width, height], four finite numbers."
    )


def _is_box(values: list[Any]) -> bool:
    return len(values) == 4 and all(type(v) in _NUMBER and math.isfinite(v) for v in values)


def _check_image_files(path: str, images: Entries, image_root: str, policy: str) -> None:
    """Every listed image must be in the image folder."""
    if not PathManager.isdir(image_root):
        raise DatasetError(f"Image folder {image_root} (for {path}) does not exist. Correct the path.")
    folders = {os.path.dirname(image["file_name"]) for image in images}
    present: set[str] = set()
    # Listing a folder once is much faster than asking for each file.
    for folder in folders:
        full = os.path.join(image_root, folder)
        if PathManager.isdir(full):
            present.update(os.path.join(folder, name) for name in PathManager.ls(full))
    missing = [image for image in images if image["file_name"] not in present]
    if not missing:
        return
    message = (
        f"{len(missing)} of the {len(images)} images that {path} lists are not in {image_root}, first "
        f"{missing[0]['file_name']}{_id_of(missing[0])}."
    )
    if policy == "error":
        raise DatasetError(f"{message} Correct the image folder, or complete it.")
    logger.warning("%s They are left out.", message)
