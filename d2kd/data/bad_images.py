"""What happens in training to an image that cannot be read: an error that names it, or another one in its place."""

import logging
from collections.abc import Callable
from typing import Any

from d2kd.data.coco_check import DatasetError
from d2kd.errors import require_choice
from detectron2.data import detection_utils

__all__ = ["ON_BAD_IMAGE", "wrap_mapper"]

logger = logging.getLogger(__name__)

ON_BAD_IMAGE = ("error", "skip")

Mapper = Callable[[dict[str, Any]], Any]


def wrap_mapper(mapper: Mapper, on_bad_image: str) -> Mapper:
    """A mapper that explains, or skips, images that cannot be decoded or that do not have their listed size.

    Args:
        mapper: takes a dataset dict.
        on_bad_image: "error" raises `DatasetError`; "skip" logs each file once per loading process and returns None,
            upon which Detectron2's loader takes another image. Evaluation must use "error": a replaced image would
            go unnoticed in its results.

    Raises:
        ConfigError: if `on_bad_image` is something else.
    """
    require_choice("DATASETS.ON_BAD_IMAGE", on_bad_image, ON_BAD_IMAGE)
    return _GuardedMapper(mapper, on_bad_image == "skip")


class _GuardedMapper:
    """Calls a mapper, and looks for the cause in the files when it fails."""

    def __init__(self, mapper: Mapper, skip: bool) -> None:
        self.mapper = mapper
        self.skip = skip
        self._reported: set[str] = set()

    def __call__(self, dataset_dict: dict[str, Any]) -> Any | None:
        try:
            return self.mapper(dataset_dict)
        except MemoryError:
            raise
        except Exception as e:
            problem = _file_problem(dataset_dict)
            if problem is None:
                raise
            if not self.skip:
                raise DatasetError(
                    f"{problem} Repair or remove it, or set DATASETS.ON_BAD_IMAGE to skip to train without it."
                ) from e
        if problem not in self._reported:
            self._reported.add(problem)
            logger.warning("%s It is skipped (DATASETS.ON_BAD_IMAGE).", problem)
        return None


def _file_problem(dataset_dict: dict[str, Any]) -> str | None:
    """What is wrong with the image or the label map of a dataset dict; None if both can be read."""
    for key, what in (("file_name", "Image"), ("sem_seg_file_name", "Label map")):
        if key not in dataset_dict:
            continue
        path = dataset_dict[key]
        try:
            array = detection_utils.read_image(path)
        # Decoders raise all kinds of exceptions on damaged files; each means the same here.
        except Exception as e:
            return f"{what} {path} cannot be read ({type(e).__name__}: {e})."
        height, width = array.shape[:2]
        expected = dataset_dict.get("height", height), dataset_dict.get("width", width)
        if (height, width) != expected:
            return (
                f"{what} {path} is {width} x {height} (width x height), but the annotations say "
                f"{expected[1]} x {expected[0]}."
            )
    return None
