"""Checks a classification dataset before any training time is spent on it."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..coco import DatasetError, short
from ..coco.image_files import MAX_IMAGES_SEEN
from ..images import image_problem, image_size
from .source import ClassificationSource, Records

logger = logging.getLogger(__name__)

#: Classes that a message names.
_SHOWN = 5


class ClassificationSummary(NamedTuple):
    """What a dataset holds."""

    num_images: int
    class_names: Sequence[str]


def check_classification(name: str, *, missing_images: str, size: int, is_train: bool = True) -> ClassificationSummary:
    """Checks a registered dataset: its records, its classes, and the first bytes of its images.

    Args:
        name: of the dataset.
        missing_images: "error", or "warn" where training leaves out images that cannot be read.
        size: shorter side, in pixels, below which an image is enlarged.
        is_train: whether it is trained on, for the words.

    Returns:
        how many images it has, and its classes.

    Raises:
        DatasetError: at the first thing that is wrong.
    """
    source: Any = DatasetCatalog[name]
    if isinstance(source, ClassificationSource):
        records, names = source.examine(missing_images)
    else:
        records, names = DatasetCatalog.get(name), MetadataCatalog.get(name).get("thing_classes") or ()
    if not records:
        raise DatasetError(f"Dataset {name!r} has no images.")
    _check_labels(name, records, names, is_train)
    _check_repeated(name, records)
    _look_at_images(name, records, missing_images, size)
    return ClassificationSummary(len(records), names)


def _check_labels(name: str, records: Records, names: Sequence[str], is_train: bool) -> None:
    for i, record in enumerate(records):
        label = record.get("label")
        if type(label) is not int or label < 0 or (names and label >= len(names)):
            classes = f", of {len(names)} classes" if names else ""
            raise DatasetError(
                f"Dataset {name!r}: record {i} ({short(record.get('file_name'))}) has label = {short(repr(label))}; an "
                f"image classifier needs a whole number from 0 on{classes}."
            )
    counts = Counter(record["label"] for record in records)
    empty = [c for label, c in enumerate(names) if not counts[label]]
    if empty:
        logger.warning(
            "Dataset %r: %d of %d classes have no images: %s%s. %s",
            name,
            len(empty),
            len(names),
            short(", ".join(empty[:_SHOWN])),
            ", ..." if len(empty) > _SHOWN else "",
            "Nothing is learned of them." if is_train else "Their own accuracy is nan.",
        )


def _check_repeated(name: str, records: Records) -> None:
    files = Counter(record["file_name"] for record in records)
    if len(files) < len(records):
        file, count = files.most_common(1)[0]
        logger.warning(
            "Dataset %r: %d images have only %d files, %s is listed %d times.",
            name,
            len(records),
            len(files),
            short(file),
            count,
        )


def _look_at_images(name: str, records: Records, policy: str, size: int) -> None:
    """Opens images, evenly spread over the dataset, to find before training what holds for many of them."""
    seen = records[:: max(1, -(-len(records) // MAX_IMAGES_SEEN))]
    told, small = False, []
    for record in seen:
        path = record["file_name"]
        problem = image_problem(path)
        if problem is None:
            small += [path] if min(image_size(path)) < size else []
        elif policy == "error":
            raise DatasetError(f"Dataset {name!r}: {problem} Repair it, or remove it from the dataset.")
        elif not told:
            told = True
            logger.warning("%s It is left out, as others may be.", problem)
    if len(small) * 2 > len(seen):
        logger.warning(
            "Dataset %r: %d of %d images that were looked at have a side shorter than %d pixels, first %s (%s). They "
            "are enlarged: see SIZE, TEST_SIZE and CROP_PCT of INPUT.CLASSIFICATION.",
            name,
            len(small),
            len(seen),
            size,
            os.path.basename(small[0]),
            " x ".join(map(str, image_size(small[0]))),
        )
