"""CUB-200-2011, read from the files of its archive."""

import os
from typing import NamedTuple

from ..coco import short
from .source import ClassificationSource, Records

#: Values of SPLIT, and what train_test_split.txt has for them.
SPLITS = {"train": "1", "test": "0"}


class _Line(NamedTuple):
    number: int
    value: str


class Cub200(ClassificationSource):
    """A part of CUB-200-2011: images.txt, image_class_labels.txt, train_test_split.txt, classes.txt, images/."""

    def __init__(self, name: str, root: str, split: str) -> None:
        """
        Args:
            name: of the dataset.
            root: the archive's folder, CUB_200_2011.
            split: "train" or "test".
        """
        super().__init__(name)
        self.root = root
        self.split = split
        self.definition = ("cub", os.path.abspath(root), split)

    def __call__(self) -> Records:
        images = self._read("images.txt")
        labels, parts = self._read("image_class_labels.txt"), self._read("train_test_split.txt")
        places = {number: place for place, number in enumerate(self._classes())}
        for file, listed in (("image_class_labels.txt", labels), ("train_test_split.txt", parts)):
            if listed.keys() != images.keys():
                other = min(listed.keys() ^ images.keys())
                which = file if other in images else "images.txt"
                raise self.error(f"{self._path(which)} has no image {other}, which the other files have.")
        for number, line in labels.items():
            if not line.value.isdecimal() or int(line.value) not in places:
                raise self._wrong("image_class_labels.txt", line, f"gives image {number} a class", "of classes.txt")
        for line in parts.values():
            if line.value not in SPLITS.values():
                raise self._wrong("train_test_split.txt", line, "has", "1 (train) or 0 (test)")
        records = [
            {
                "file_name": os.path.join(self.root, "images", line.value),
                "image_id": number,
                "label": places[int(labels[number].value)],
            }
            for number, line in images.items()
            if parts[number].value == SPLITS[self.split]
        ]
        if not records:
            raise self.error(f"{self._path('train_test_split.txt')} puts no image into {self.split}.")
        return records

    def class_names(self) -> list[str]:
        return list(self._classes().values())

    def _classes(self) -> dict[int, str]:
        return {number: line.value for number, line in sorted(self._read("classes.txt").items())}

    def _read(self, file: str) -> dict[int, _Line]:
        """The lines "NUMBER VALUE" of a file, by their numbers."""
        path = self._path(file)
        try:
            with open(path, encoding="utf-8") as opened:
                lines = [line.strip().split(maxsplit=1) for line in opened]
        except OSError as error:
            raise self.error(
                f"{path} cannot be read ({error.strerror}). ROOT must be the folder CUB_200_2011 of the archive, with "
                "images.txt, image_class_labels.txt, train_test_split.txt and classes.txt in it."
            ) from error
        except UnicodeDecodeError as error:
            raise self.error(f"{path} is no text file.") from error
        found: dict[int, _Line] = {}
        for i, parts in enumerate(lines, 1):
            if not parts:
                continue
            if len(parts) < 2 or not parts[0].isdecimal():
                raise self.error(f"{path}, line {i}, is {short(' '.join(parts))!r}; it must be a number and a value.")
            if int(parts[0]) in found:
                raise self.error(f"{path}, line {i}, has number {parts[0]} again.")
            found[int(parts[0])] = _Line(i, parts[1])
        if not found:
            raise self.error(f"{path} is empty.")
        return found

    def _path(self, file: str) -> str:
        return os.path.join(self.root, file)

    def _wrong(self, file: str, line: _Line, has: str, must: str) -> Exception:
        return self.error(f"{self._path(file)}, line {line.number}, {has} {short(line.value)!r}; it must be {must}.")
