"""Where a classification dataset comes from: one object in the catalog that reads records, classes, and what to say."""

from collections.abc import Sequence
from typing import Any

from ..coco import DatasetError

#: [{"file_name": str, "image_id": int, "label": int}, ...]
Records = list[dict[str, Any]]


class ClassificationSource:
    """Reads a dataset whose every image has one label; a function without arguments, as the catalog wants it.

    Formats derive from it. Nothing is read before a method is called.
    """

    #: FORMAT and the values of its keys, for messages and to tell whether two are the same.
    definition: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        """
        Args:
            name: of the dataset, for messages.
        """
        self.name = name

    def __call__(self) -> Records:
        """Returns the records.

        Raises:
            DatasetError: there are none, or what lists them is broken.
        """
        raise NotImplementedError

    def class_names(self) -> list[str]:
        """Returns the names of the classes in the order of the labels.

        Raises:
            DatasetError: they cannot be read.
        """
        raise NotImplementedError

    def examine(self, missing_images: str) -> tuple[Records, Sequence[str]]:
        """Reads records and classes, and logs what an owner of the dataset should know.

        Args:
            missing_images: "error", or "warn" where training leaves out images that cannot be read.
        """
        return self(), self.class_names()

    def error(self, message: str) -> DatasetError:
        """Returns an error that names the dataset."""
        return DatasetError(f"Dataset {self.name!r}: {message}")
