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
    names: list[str] = list(value) if isinstance(value, (list, tuple)) else []
    for label, name in enumerate(names):
        if not isinstance(name, str):
            raise DatasetError(f"{where}: the name of class {label} is {name!r}, which is no text: put it in quotes.")
    if not names or any(not name.strip() for name in names):
        raise DatasetError(f"{where} is {shown}; it must list the names of the classes, that of label 0 first.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DatasetError(f"{where} has {', '.join(twice)} more than once; each class needs a name of its own.")
    return names


def optional_class_names(where: str, value: Any) -> list[str] | None:
    """As `class_names`; None where there is no such key."""
    return None if value is None else class_names(where, value)


def _read(where: str, path: str) -> Any:
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    found = next((p for p in (os.path.expanduser(path), os.path.join(root, path)) if os.path.isfile(p)), None)
    if found is None:
        raise DatasetError(f"{where} is {path!r}, and there is no such file: name it, or list the classes.")
    text = read_text(found, lambda message: DatasetError(f"{where}: {message}"))
    if not found.lower().endswith((".yaml", ".yml")):
        return [line.strip() for line in text.split("\n") if line.strip()]
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DatasetError(f"{where} is {path!r}, which is no YAML ({str(error).partition(chr(10))[0]}).") from error
    names = content.get("names") if isinstance(content, Mapping) else None
    if isinstance(names, Mapping):
        if set(names) != set(range(len(names))):
            raise DatasetError(f"{where} is {path!r}, whose names have the numbers {list(names)}; they count from 0.")
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list):
        raise DatasetError(f"{where} is {path!r}, which has no list of `names`.")
    return names
