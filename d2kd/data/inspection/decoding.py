"""Every pixel of images and label maps, read in threads: what lies in the middle of a file is not seen otherwise."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tqdm import tqdm

from ..coco import DatasetError
from ..images import LabelMapError, LabelRange, image_problem, read_label_map

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
#: Decoders are not Python, so that threads run at once; with more of them the disk is what is waited for.
_MOST_THREADS = 16
#: Items a thread has before it, so that results of millions do not pile up.
_AHEAD = 1024
#: Seconds from which on the progress is shown.
_PATIENCE = 2.0


def in_threads(function: Callable[[_Item], _Result], items: Sequence[_Item], what: str) -> Iterator[_Result]:
    """Yields what a function returns for each item, in order, and shows the progress where it takes long.

    Args:
        what: is done, for the progress.
    """
    with (
        ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS)) as pool,
        tqdm(total=len(items), desc=what, mininterval=1.0, delay=_PATIENCE) as progress,
    ):
        for start in range(0, len(items), _AHEAD):
            for result in pool.map(function, items[start : start + _AHEAD]):
                progress.update()
                yield result


def unusable_images(name: str, records: Sequence[dict[str, Any]], labels: LabelRange | None = None) -> dict[str, str]:
    """Decodes the images of a dataset, and the label maps that stand beside boxes.

    Args:
        name: of the dataset, for the progress.
        records: in Detectron2's format.
        labels: that label maps may have; None admits all.

    Returns:
        What is wrong, by the file.
    """

    def look(record: dict[str, Any]) -> tuple[str, str | None]:
        file, size = record["file_name"], None
        if "width" in record and "height" in record:
            size = record["width"], record["height"]
        problem = image_problem(file, size, decode=True)
        if problem is None and "annotations" in record and "sem_seg_file_name" in record:
            try:
                read_label_map(record["sem_seg_file_name"], labels=labels)
            except LabelMapError as error:
                return record["sem_seg_file_name"], str(error)
        return file, problem

    found = in_threads(look, records, f"Decoding the images of {name}")
    return {file: problem for file, problem in found if problem is not None}


def refuse(problems: dict[str, str], total: int, is_train: bool) -> None:
    """
    Args:
        problems: by the file; there may be none.
        total: number of files that were looked at.
        is_train: whether it is trained on, for the advice.

    Raises:
        DatasetError: there is a problem, as a training or an evaluation says it when it comes there.
    """
    if not problems:
        return
    first, *others = problems
    named = ", ".join(map(os.path.basename, others[:3])) + (", ..." if len(others) > 3 else "")
    more = f" So it is with {len(problems)} of {total}, others are {named}." if others else ""
    other = ", or set DATASETS.ON_BAD_IMAGE to skip to train without it" if is_train else ""
    raise DatasetError(f"{problems[first]}{more} Repair it or remove it from the dataset{other}.")
