"""Names of classes as an entry of `DATASETS.REGISTER` gives them."""

import os
from collections.abc import Mapping
from typing import Any

import yaml

from .coco import DatasetError
from .text_files import read_text


def class_names(where: str, value: Any) -> list[str]:
    """Returns the names of classes from the CLASSES of an entry: a list, a text file with one name a line, or YOLO's
    data.yaml with its `names`.

    Args:
        where: the key in full, for messages.
        value: of the key; None where there is none.

    Raises:
        DatasetError: it is none of them, or a name is missing, no text, or twice.
    """
    shown = repr(value)
    if isinstance(value, str):
        value = _read(where, value)
    given = list(value) if isinstance(value, (list, tuple)) else []
    for label, name in enumerate(given):
        # digits are usual names; what YAML makes of yes, 1.0 or nothing is not what was written
        if not isinstance(name, str) and type(name) is not int:
            raise DatasetError(f"{where}: the name of class {label} is {name!r}, which is no text: put it in quotes.")
    names = [str(name) for name in given]
    if not names or any(not name.strip() for name in names):
        raise DatasetError(f"{where} is {shown}; it must list the names of the classes, that of label 0 first.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DatasetError(f"{where} has {', '.join(twice)} more than once; each class needs a name of its own.")
    return names


def optional_class_names(where: str, value: Any) -> list[str] | None:
    """As `class_names`; None where there is no such key."""
    return None if value is None else class_names(where, value)


def key_point_shape(where: str, value: Any) -> tuple[int, int] | None:
    """Returns the `kpt_shape` of YOLO's data.yaml: how many key points an object has, and how many numbers one of them;
    None where CLASSES is no such file, or has none.

    Raises:
        DatasetError: it is no such pair.
    """
    if not isinstance(value, str) or not _is_yaml(value):
        return None
    content = _read_yaml(where, value)
    shape = content.get("kpt_shape") if isinstance(content, Mapping) else None
    if shape is None:
        return None
    match shape:
        case [int(number), 2 | 3 as values] if number > 0:
            return number, values
    raise DatasetError(
        f"{where} is {value!r}, whose kpt_shape is {shape!r}; it must be the number of key points, and 2 or 3 for the "
        "numbers of each."
    )


def _read(where: str, path: str) -> Any:
    if not _is_yaml(path):
        return [line.strip() for line in _read_text(where, path).split("\n") if line.strip()]
    content = _read_yaml(where, path)
    names = content.get("names") if isinstance(content, Mapping) else None
    if isinstance(names, Mapping):
        if set(names) != set(range(len(names))):
            raise DatasetError(f"{where} is {path!r}, whose names have the numbers {list(names)}; they count from 0.")
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list):
        raise DatasetError(f"{where} is {path!r}, which has no list of `names`.")
    return names


def _is_yaml(path: str) -> bool:
    return path.lower().endswith((".yaml", ".yml"))


def _read_yaml(where: str, path: str) -> Any:
    try:
        return yaml.safe_load(_read_text(where, path))
    except yaml.YAMLError as error:
        raise DatasetError(f"{where} is {path!r}, which is no YAML ({str(error).partition(chr(10))[0]}).") from error


def _read_text(where: str, path: str) -> str:
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    found = next((p for p in (os.path.expanduser(path), os.path.join(root, path)) if os.path.isfile(p)), None)
    if found is None:
        raise DatasetError(f"{where} is {path!r}, and there is no such file: name it, or list the classes.")
    return read_text(found, lambda message: DatasetError(f"{where}: {message}"))
