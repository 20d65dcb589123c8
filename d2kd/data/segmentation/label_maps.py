"""Datasets of two folders: images, and their label maps by the same names."""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..coco import DatasetError
from ..folders import IMAGE_SUFFIXES, files_by_key, near_name
from ..images import image_problem, image_size, label_map_problem

logger = logging.getLogger(__name__)

#: Formats of label maps: those that keep their values exactly.
LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".pgm")
#: What is ignored unless it is said.
IGNORED = 255


class LabelMaps:
    """Images and label maps, paired by their paths in the two folders, endings aside; hidden files are left out."""

    def __init__(self, name: str, images: str, labels: str, suffix: str = "") -> None:
        """
        Args:
            name: of the dataset.
            images, labels: the folders, which may have folders in them.
            suffix: what the names of label maps have behind those of their images, e.g. "_labels".
        """
        self.name = name
        self.images = images
        self.labels = labels
        self.suffix = suffix

    def __call__(self) -> list[dict[str, Any]]:
        """Returns records in Detectron2's format; sizes are read with the images."""
        images, labels = self._listed()
        return [
            {"file_name": images[key], "sem_seg_file_name": labels[key], "image_id": key}
            for key in sorted(images.keys() & labels.keys())
        ]

    def check(self, *, leave_out: bool = False) -> int:
        """Looks at all names, and at the beginning of all files: what they are, and whether sizes agree.

        Args:
            leave_out: images that cannot be used are only told of: training goes without them.

        Returns:
            How many pairs there are.

        Raises:
            DatasetError: names do not pair, or a file cannot be used.
        """
        images, labels = self._listed()
        alone = [("image", sorted(images.keys() - labels.keys()), images, "label map", self.labels)]
        alone += [("label map", sorted(labels.keys() - images.keys()), labels, "image", self.images)]
        for what, keys, paths, other, folder in alone:
            if keys:
                self._complain(self._unpaired(what, keys, paths, other, folder, labels), leave_out and what == "image")
        pairs = sorted(images.keys() & labels.keys())
        if not pairs:
            raise self.error(f"no image of {self.images} has a label map in {self.labels}.")
        problems = [problem for key in pairs if (problem := _problem(images[key], labels[key]))]
        if problems:
            more = f" So it is with {len(problems)} of {len(pairs)}." if len(problems) > 1 else ""
            self._complain(f"{problems[0]}{more}", leave_out)
        return len(pairs)

    def error(self, message: str) -> DatasetError:
        """Returns an error that names the dataset."""
        return DatasetError(f"Dataset {self.name!r}: {message}")

    def _complain(self, message: str, leave_out: bool) -> None:
        if not leave_out:
            raise self.error(message)
        logger.warning("Dataset %r: %s Such images are left out (DATASETS.ON_BAD_IMAGE).", self.name, message)

    def _unpaired(
        self,
        what: str,
        keys: Sequence[str],
        paths: Mapping[str, str],
        other: str,
        folder: str,
        labels: Mapping[str, str],
    ) -> str:
        first = os.path.basename(paths[keys[0]])
        where = os.path.join(os.path.dirname(keys[0]), first)  # below its folder
        text = f"{len(keys)} {what}s have no {other} of the same name in {folder}, first {where}."
        if other == "label map" and not self.suffix and labels:
            longer = next((key for key in sorted(labels) if key.startswith(keys[0])), None)
            if longer is not None:
                return f"{text} There is {longer}: set LABEL_SUFFIX to {longer[len(keys[0]) :]!r}."
        return f"{text}{near_name(keys[0], labels) if other == 'label map' else ''} Add or remove them."

    def _listed(self) -> tuple[dict[str, str], dict[str, str]]:
        images = files_by_key(self.images, IMAGE_SUFFIXES, "images", self.error)
        labels = files_by_key(self.labels, LABEL_SUFFIXES, "label maps", self.error, self.suffix)
        return images, labels


def _problem(image: str, labels: str) -> str | None:
    return image_problem(image) or label_map_problem(labels, image_size(image))


def ignored_label(where: str, value: Any) -> int:
    """Returns the label that is ignored, from the IGNORE of an entry.

    Raises:
        DatasetError: it is no label.
    """
    if value is None:
        return IGNORED
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 65535:
        raise DatasetError(f"{where} is {value!r}; it must be a label, from 0 to 65535.")
    return value


def label_suffix(where: str, value: Any) -> str:
    """Returns the LABEL_SUFFIX of an entry.

    Raises:
        DatasetError: it is no text.
    """
    if value is not None and not isinstance(value, str):
        raise DatasetError(f"{where} is {value!r}; it must be the end of the names of label maps, e.g. '_labels'.")
    return value or ""
