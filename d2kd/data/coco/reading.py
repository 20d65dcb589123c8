"""Reads a COCO file into the one form that training and evaluation work with; what it cannot mean is an error."""

import contextlib
import gc
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from d2kd.errors import UserError
from d2kd.files import describe_foreign_file
from detectron2.utils.file_io import PathManager

Entries = list[dict[str, Any]]

#: Longest side that an image may have, in pixels.
MAX_SIDE = 2**24

_KEYS: dict[str, tuple[str, ...]] = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
#: What exporters write for the flags of COCO, which are 0 or 1.
_FLAGS: dict[Any, int] = {0: 0, 1: 1, None: 0, "": 0, "0": 0, "1": 1}


class DatasetError(UserError):
    """Something is wrong with a dataset; the message says what, where, and what to do."""


@dataclass
class CocoFile:
    """A COCO file in which every reference is known to hold.

    Ids are whole numbers or strings, sizes positive whole numbers, file names without doubled slashes; `iscrowd` is 0
    or 1 and always there. Boxes, areas and segmentations are as in the file.
    """

    path: str
    images: Entries
    annotations: Entries
    categories: Entries
    #: What was read otherwise than it stands in the file.
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Adds to the notes what is not yet there."""
        if text not in self.notes:
            self.notes.append(text)

    @property
    def class_names(self) -> list[str]:
        """Names of the categories in the order of their ids, which is that of the model's classes."""
        return [category["name"] for category in self.sorted_categories()]

    def sorted_categories(self) -> Entries:
        """Returns the categories in the order of their ids."""
        return sorted(self.categories, key=lambda category: id_order(category["id"]))

    def where(self, annotation: dict[str, Any]) -> str:
        """Returns which annotation it is, for messages."""
        image = next(image for image in self.images if image["id"] == annotation["image_id"])
        return f"annotation{id_of(annotation)} in {short(image['file_name'])}"


def id_order(value: Any) -> tuple[bool, Any]:
    """Returns the key that sorts ids: numbers, then strings."""
    return isinstance(value, str), value


def id_of(entry: Any) -> str:
    """Returns " (id 3)" for messages; "" for what has none."""
    return f" (id {short(entry['id'])})" if isinstance(entry, dict) and "id" in entry else ""


def short(value: Any, longest: int = 80) -> str:
    """Returns a value of the file for a message, on one line and not too long."""
    text = repr(value) if not (isinstance(value, str) and value.isprintable()) else value
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """Switches the garbage collector off: it would scan millions of new objects again and again."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@without_gc()
def read_coco(path: str, *, need_annotations: bool = True) -> CocoFile:
    """Reads a COCO instances file.

    Args:
        path: the annotation file.
        need_annotations: whether a file without "annotations" (an image list) is an error.

    Raises:
        DatasetError: at the first thing that is wrong.
    """
    if not PathManager.isfile(path):
        what = "is a directory, not a file" if PathManager.isdir(path) else "does not exist"
        raise DatasetError(f"Annotation file {path} {what}. Correct the path.")
    try:
        with PathManager.open(path, "rb") as f:  # bytes, of which JSON tells the encoding
            content = json.load(f)
    except UserError:  # of a dataset that is converted when it is opened
        raise
    except (ValueError, RecursionError) as e:  # also of numbers with too many digits
        reason = describe_foreign_file(path) or _first_line(e)
        raise DatasetError(f"{path} is not JSON ({reason}). Is it complete, and the annotation file?") from e
    except OSError as e:
        raise DatasetError(f"Annotation file {path} cannot be read ({_first_line(e)}).") from e
    return parse_coco(path, content, need_annotations=need_annotations)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def parse_coco(path: str, content: Any, *, need_annotations: bool = True) -> CocoFile:
    """As `read_coco`, for the content of a file; its entries are changed in place."""
    required = [section for section in _KEYS if need_annotations or section != "annotations"]
    images, annotations, categories = _sections(path, content, required)
    file = CocoFile(path, images, annotations, categories)
    _check_sizes(file)
    for section, keys in (
        ("images", ["id"]),
        ("categories", ["id"]),
        ("annotations", ["id", "image_id", "category_id"]),
    ):
        entries = getattr(file, section)
        for key in keys:
            _read_ids(file, section, entries, key)
        # Detectron2 admits the repeated annotation ids of COCO's 2014 minival files; so does this.
        if section != "annotations" or "minival" not in os.path.basename(path):
            _check_unique(path, section, entries)
    _check_names(file)
    _check_listed(file, "image_id", "images", file.images)
    _check_listed(file, "category_id", "categories", file.categories)
    _read_flags(file)
    return file


def _sections(path: str, content: Any, required: Sequence[str]) -> list[Entries]:
    """The lists "images", "annotations" and "categories" of objects; one that is not required may be missing."""
    if not isinstance(content, dict):
        raise DatasetError(
            f"{path} is not in COCO format: its top level is a {type(content).__name__}, not an object with "
            "images, annotations and categories."
        )
    for key in required:
        if key not in content:
            raise DatasetError(
                f"{path} is not in COCO format: it has no {key!r} (it has {short(sorted(content)[:8])}). Use an "
                "instances file with images, annotations and categories."
            )
    sections = [content.get(key, []) for key in _KEYS]
    for key, entries in zip(_KEYS, sections):
        if not isinstance(entries, list):
            raise DatasetError(f"{path} is not in COCO format: {key!r} is a {type(entries).__name__}, not a list.")
        wanted = set(_KEYS[key])
        for i, entry in enumerate(entries):
            if not isinstance(entry, dict) or not wanted <= entry.keys():
                has = (
                    f"lacks {sorted(wanted - entry.keys())}" if isinstance(entry, dict) else f"is {short(repr(entry))}"
                )
                raise DatasetError(
                    f"{path} is not in COCO format: {key}[{i}]{id_of(entry)} {has}. Each needs {', '.join(_KEYS[key])}."
                )
    for key, entries in (("images", sections[0]), ("categories", sections[2])):
        if not entries:
            raise DatasetError(f"{path} lists no {key}. Use a file that has some.")
    return sections


def _malformed(
    path: str, section: str, entries: Entries, key: str, is_right: Callable[[Any], bool], rule: str
) -> NoReturn:
    """Names the first entry whose value of a key is wrong."""
    i, entry = next((i, e) for i, e in enumerate(entries) if not is_right(e[key]))
    raise DatasetError(
        f"{path} is not in COCO format: {section}[{i}]{id_of(entry) if key != 'id' else ''} has {key} = "
        f"{short(repr(entry[key]))}. It must be {rule}."
    )


def _check_sizes(file: CocoFile) -> None:
    """Sizes of images become whole numbers."""
    for key in ("height", "width"):
        for image in file.images:
            value = image[key]
            if type(value) is float and value.is_integer():
                image[key] = value = int(value)
                file.note("sizes of images are floats")
            if type(value) is not int or not 0 < value <= MAX_SIDE:
                _malformed(
                    file.path,
                    "images",
                    file.images,
                    key,
                    lambda v: type(v) is int and 0 < v <= MAX_SIDE,
                    f"of type int or float and positive, a whole number of pixels up to {MAX_SIDE}",
                )


def _check_names(file: CocoFile) -> None:
    """File and class names are strings; no two classes have one name."""
    for section, key in (("images", "file_name"), ("categories", "name")):
        entries: Entries = getattr(file, section)
        if not all(type(entry[key]) is str and entry[key] for entry in entries):
            _malformed(file.path, section, entries, key, lambda v: type(v) is str and bool(v), "of type str, not empty")
    for image in file.images:
        if "\0" in image["file_name"]:
            _malformed(file.path, "images", file.images, "file_name", lambda v: "\0" not in v, "a file name")
        image["file_name"] = re.sub(r"(?<!:)//+", "/", image["file_name"])
    by_name: dict[str, dict[str, Any]] = {}
    for category in file.categories:
        other = by_name.setdefault(category["name"], category)
        if other is not category:
            raise DatasetError(
                f"{file.path}: the categories with the ids {short(other['id'])} and {short(category['id'])} have one "
                f"name, {short(category['name'])!r}: merge them, or give each its own name."
            )


def _is_id(value: Any) -> bool:
    # whole floats, as table programs write them, as far as floats tell whole numbers apart
    return type(value) in (int, str) or (type(value) is float and value.is_integer() and abs(value) < 2**53)


def _read_ids(file: CocoFile, section: str, entries: Entries, key: str) -> None:
    """Ids become whole numbers or stay strings."""
    types = {type(entry[key]) for entry in entries}
    if types <= {int} or types <= {str}:
        return
    if not all(_is_id(entry[key]) for entry in entries):
        _malformed(file.path, section, entries, key, _is_id, "an id: of type int or str")
    for entry in entries:
        if type(entry[key]) is float:
            entry[key] = int(entry[key])
    if float in types:
        file.note(f"values of {section}.{key} are floats")
    if str in types and key == "id":
        file.note(f"some ids of {section} are numbers and some are strings")


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
        f"{path}: {len(twice)} of the {len(ids)} {section} repeat an id, first id {short(twice[0])}. Give each its own "
        "id."
    )


def _check_listed(file: CocoFile, key: str, section: str, entries: Entries) -> None:
    """What annotations refer to must be listed."""
    known = {e["id"] for e in entries}
    wrong = [a for a in file.annotations if a[key] not in known]
    if not wrong:
        return
    value = wrong[0][key]
    as_other_type = next((i for i in known if str(i) == str(value)), None)
    hint = "" if as_other_type is None else f" There is {as_other_type!r}, but annotations have {value!r}: one type."
    raise DatasetError(
        f"{file.path}: {len(wrong)} of {len(file.annotations)} annotations have a {key} that is not listed under "
        f"{section}, first annotation{id_of(wrong[0])} with {key} {short(value)}.{hint} List it, or remove the "
        "annotations."
    )


def _read_flags(file: CocoFile) -> None:
    """`iscrowd` becomes 0 or 1; `ignore`, which neither Detectron2 nor COCO's evaluation knows, must be 0."""
    for key in ("iscrowd", "ignore"):
        values = [annotation.get(key, 0) for annotation in file.annotations]
        if all(type(value) is int and value == 0 for value in values) and key == "ignore":
            continue
        for i, (annotation, value) in enumerate(zip(file.annotations, values)):
            flag = _FLAGS.get(value) if isinstance(value, (int, float, str, type(None))) else None
            if flag is None or (key == "ignore" and flag):
                rule = "0 or 1" if key == "iscrowd" else "0: mark the annotation by iscrowd 1, or remove it"
                raise DatasetError(
                    f"{file.path}: annotations[{i}]{id_of(annotation)} has {key} = {short(repr(value))}. It must be "
                    f"{rule}."
                )
            annotation[key] = flag
            if type(value) is not int:
                file.note(f"{key} is written as {value!r}")
