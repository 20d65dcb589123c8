"""YOLO's text files: one for each image, a line an object, as shares of the image's size; read by labelformat.

A line is the number of a class, and either x and y of a box's center, its width and height, or the points of a polygon.
Labels for poses have key points behind the box.
"""

import io
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pycocotools.mask as mask_util

from ..class_list import class_names, key_point_shape
from ..coco import DatasetError, short
from ..folders import IMAGE_SUFFIXES, files_by_key, near_name
from ..images import image_problem, image_size
from ..text_files import read_text
from .source import ConvertedSource, plain_number

logger = logging.getLogger(__name__)

#: Points of an object as shares of the image's size; two are a box: its center, and its width and height.
Points = Sequence[tuple[float, float]]

#: Text files that lie beside labels and are none.
_NO_LABELS = {"classes", "obj.names", "labels", "notes"}
#: How far shares may lie outside 0 to 1 before they must be something else.
_MARGIN = 0.5
_LINE = (
    "A line is the number of a class, and then x, y, width and height of a box, or three or more points x y of a "
    "polygon, as shares of the image's size"
)


class YoloClasses(NamedTuple):
    """What CLASSES says of the objects."""

    #: Names, that of class 0 first.
    names: Sequence[str]
    #: Key points of an object, and numbers of each, where labels have them behind the box.
    key_points: tuple[int, int] | None = None


def yolo_classes(where: str, value: Any) -> YoloClasses:
    """Returns the CLASSES of an entry.

    Raises:
        DatasetError: see `class_names` and `key_point_shape`.
    """
    return YoloClasses(class_names(where, value), key_point_shape(where, value))


class YoloLabels(ConvertedSource):
    """Images, and label files of the same names; images without one have no objects."""

    FORMAT = "yolo"

    def __init__(self, name: str, images: str, labels: str, classes: "YoloClasses") -> None:
        """
        Args:
            name: of the dataset.
            images, labels: the folders, which may have folders in them.
            classes: of the objects.
        """
        super().__init__(name, images)
        self.labels = labels
        self.classes = list(classes.names)
        self.key_points = classes.key_points

    def content(self) -> dict[str, Any]:
        """As in the base class; the boxes are those that a COCO file of the same objects has (`plain_number`)."""
        paths = files_by_key(self.images, IMAGE_SUFFIXES, "images", self.error)
        keys = sorted(paths)
        labeled = self._labeled(keys)
        if self.key_points is not None:
            logger.info("Dataset %r: CLASSES has a kpt_shape; boxes are read, and key points left out", self.name)
        sizes = [self._size(paths[key]) for key in keys]
        found = self._objects([key for key in keys if key in labeled])
        objects = {key: list(items) for key, items in found}
        annotations: list[dict[str, Any]] = []
        for number, (key, size) in enumerate(zip(keys, sizes), 1):
            for category, points in objects.get(key, ()):
                self._check_points(key, points)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": category,
                        "iscrowd": 0,
                        **(_box(points, size) if len(points) == 2 else _polygon(points, size)),
                    }
                )
        return {
            "images": [
                {"id": number, "file_name": os.path.relpath(paths[key], self.images), "width": width, "height": height}
                for number, (key, (width, height)) in enumerate(zip(keys, sizes), 1)
            ],
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for number, name in enumerate(self.classes)],
        }

    def _labeled(self, keys: Sequence[str]) -> set[str]:
        """The keys of images that have a label file."""
        files = files_by_key(self.labels, [".txt"], "label files", self.error)
        labels = {key for key in files if os.path.basename(key) not in _NO_LABELS or key in keys}
        alone = sorted(labels.difference(keys))
        if alone and not labels.intersection(keys):
            raise self.error(
                f"no image of {self.images} has a label file of its name in {self.labels}; the first image is "
                f"{keys[0]}, the first label file {alone[0]}.txt."
            )
        if alone:
            logger.warning(
                "Dataset %r: %d of %d label files have no image of their name, first %s.txt.%s They are left out.",
                self.name,
                len(alone),
                len(labels),
                alone[0],
                near_name(alone[0], keys, cutoff=0.8),
            )
        return labels.intersection(keys)

    def _size(self, path: str) -> tuple[int, int]:
        problem = image_problem(path)
        if problem is not None:
            raise self.error(f"{problem} Boxes of YOLO are shares of the image's size: repair it or remove it.")
        return image_size(path)

    def _objects(self, keys: Sequence[str]) -> Iterator[tuple[str, Iterable[tuple[int, Points]]]]:
        """Classes and points of the objects of each image, by labelformat."""
        try:
            from labelformat.formats import YOLOv8InstanceSegmentationInput
            from labelformat.model.category import Category
            from labelformat.model.image import Image
        except ImportError as error:
            raise self.not_installed("labelformat") from error

        source, seen = self, [""]

        class Reader(YOLOv8InstanceSegmentationInput):
            """Reads label files of the images that it is given, whose sizes of 1 x 1 leave shares as they are."""

            def __init__(self) -> None:
                """Reads no data.yaml."""

            def get_categories(self) -> Iterator[Category]:
                return (Category(number, name) for number, name in enumerate(source.classes))

            def get_images(self) -> Iterator[Image]:
                for number, key in enumerate(keys):
                    seen[0] = key
                    yield Image(number, key, 1, 1)

            def _labels_dir(self) -> Any:
                return _LabelFile(source, source.labels)

        try:
            for labels in Reader().get_labels():
                objects: list[Any] = list(labels.objects)  # each with one polygon
                yield keys[labels.image.id], [(o.category.id, o.segmentation.polygons[0]) for o in objects]
        except KeyError as error:
            raise self.error(
                f"{self._file(seen[0])} has an object of class {error}, and CLASSES lists {len(self.classes)}, from 0 "
                f"on: {short(', '.join(self.classes))}."
            ) from error
        except DatasetError:  # of `_LabelFile`, or of what reads the objects
            raise
        except ValueError as error:
            raise self.error(f"{self._file(seen[0])} cannot be read ({error}). {_LINE}.") from error

    def _file(self, key: str) -> str:
        return os.path.join(self.labels, f"{key}.txt")

    def _check_points(self, key: str, points: Points) -> None:
        values = [value for point in points for value in point]
        wrong = next((v for v in values if not -_MARGIN <= v <= 1 + _MARGIN), None)  # so is NaN
        if wrong is None and (len(points) > 2 or min(points[1]) >= 0):
            return
        shown = min(points[1]) if wrong is None else wrong
        hint = " This looks like pixels: divide x by the width and y by the height." if shown > 1 else ""
        raise self.error(f"{self._file(key)} has the number {shown:g}. {_LINE}, from 0 to 1.{hint}")


class _LabelFile:
    """What labelformat opens: the lines of a label file that are not empty, if all of them have the right length."""

    def __init__(self, source: YoloLabels, path: str) -> None:
        self.source, self.path = source, path

    def __truediv__(self, name: str) -> "_LabelFile":
        return _LabelFile(self.source, os.path.join(self.path, name))

    def with_suffix(self, suffix: str) -> "_LabelFile":
        return _LabelFile(self.source, self.path + suffix)

    def exists(self) -> bool:
        return True  # as was listed

    def open(self) -> io.StringIO:
        lines = read_text(self.path, self.source.error).split("\n")
        return io.StringIO(
            "\n".join(self._object(number, line) for number, line in enumerate(lines, 1) if line.strip())
        )

    def _object(self, number: int, line: str) -> str:
        """A line without key points."""
        values, shape = line.split(), self.source.key_points
        if len(values) == 5 or (shape is None and len(values) >= 7 and len(values) % 2):
            return line
        length = 5 + math.prod(shape or ())
        if shape is not None and len(values) == length:
            return " ".join(values[:5])
        said = f"{self.path}, line {number}, has {len(values)} values ({short(line.strip(), 40)})."
        if shape is None:
            raise self.source.error(f"{said} {_LINE}.")
        raise self.source.error(
            f"{said} By the kpt_shape {list(shape)} of CLASSES it must have 5, or {length} with key points."
        )


def _box(points: Points, size: tuple[int, int]) -> dict[str, Any]:
    """COCO's box of a center and a width and height."""
    place, extent = [], []
    for side, (center, length) in zip(size, zip(*points)):
        rounding = _rounding([value for point in points for value in point]) * side
        pixels = plain_number(length * side, rounding)
        extent.append(pixels)
        place.append(plain_number(center * side - pixels / 2, 1.5 * rounding))
    return {"bbox": [*place, *extent]}


def _polygon(points: Points, size: tuple[int, int]) -> dict[str, Any]:
    """COCO's segmentation, with its box and area."""
    rounding = _rounding([value for point in points for value in point])
    xs, ys = ([plain_number(value * side, rounding * side) for value in axis] for side, axis in zip(size, zip(*points)))
    flat = [value for point in zip(xs, ys) for value in point]
    extent = [plain_number(max(axis) - min(axis), 1e-9) for axis in (xs, ys)]
    runs = mask_util.frPyObjects([flat], size[1], size[0])
    return {
        "bbox": [min(xs), min(ys), *extent],
        "segmentation": [flat],
        "area": float(mask_util.area(mask_util.merge(runs))),
    }


def _rounding(shares: Sequence[float]) -> float:
    """How far rounding may have moved shares that are written with six decimals, as is usual, or with more."""
    for decimals in range(6, 13):
        if all(math.isclose(share, round(share, decimals), rel_tol=0.0, abs_tol=1e-15) for share in shares):
            return 0.5 * 10.0**-decimals + 1e-13
    return 1e-13
