"""Images with one label each, and label maps: how many of each class."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..coco.image_files import MAX_IMAGES_SEEN
from ..images import LabelMapError, LabelRange, image_problem, image_size, read_label_map
from .decoding import in_threads, refuse
from .report import Report, describe_sizes


def inspect_labels(name: str, records: Sequence[dict[str, Any]], names: Sequence[str], is_train: bool) -> Report:
    """Reports on a dataset for image classification: `records` with "label"; see `inspect_objects`."""
    counts = Counter(record["label"] for record in records)
    report = Report(f"{name}: {len(records)} images of {len(names)} classes", columns=["class", "images"])
    report.rows = [[class_name, counts[label]] for label, class_name in enumerate(names)]
    report.facts.append(_sizes(_some(records)))
    report.compare_classes(names, [counts[label] for label in range(len(names))], "images", is_train)
    return report


def inspect_label_maps(
    name: str,
    records: Sequence[dict[str, Any]],
    names: Sequence[str],
    ignored: int | None,
    is_train: bool,
    *,
    labels: LabelRange | None = None,
    leave_out: bool = False,
    quick: bool = False,
) -> Report:
    """Reports on a dataset for semantic segmentation: `records` with "sem_seg_file_name"; see `inspect_objects`.

    Args:
        ignored: the label that does not count.
        labels: those that training, or evaluation, admits; None admits all.
        leave_out: label maps that cannot be used are told of only: training goes without them.
        quick: read up to `MAX_IMAGES_SEEN` label maps, evenly spread, instead of all.

    Raises:
        DatasetError: a label map cannot be read, or has other labels than are admitted.
    """
    seen = _some(records) if quick else records
    pixels = np.zeros(len(names), dtype=np.int64)
    images = np.zeros(len(names), dtype=int)
    left_out, unusable, unknown, bare = 0, dict[str, str](), [], []
    files = [record["sem_seg_file_name"] for record in seen]

    def count(file: str) -> tuple[np.ndarray, np.ndarray] | LabelMapError:
        try:
            return np.unique(read_label_map(file, labels=labels), return_counts=True)
        except LabelMapError as error:
            return error

    for file, result in zip(files, in_threads(count, files, f"Reading the label maps of {name}")):
        if isinstance(result, LabelMapError):
            unusable[file] = str(result)
            continue
        found, counts = result
        known = (found >= 0) & (found < len(names)) & (found != (-1 if ignored is None else ignored))
        pixels[found[known]] += counts[known]
        images[found[known]] += 1
        left_out += int(counts[found == ignored].sum()) if ignored is not None else 0
        unknown += [file] if (~known & (found != ignored)).any() else []
        bare += [] if known.any() else [file]
    if not leave_out:
        refuse(unusable, len(seen), is_train)
    total = max(int(pixels.sum()), 1)
    read = "" if len(seen) == len(records) else f", of which {len(seen)} were read"
    report = Report(f"{name}: {len(records)} images with label maps of {len(names)} classes{read}")
    report.columns = ["class", "pixels", "images"]
    report.rows = [[n, f"{p / total:.2%}", i] for n, p, i in zip(names, pixels.tolist(), images.tolist())]
    report.facts.append(_sizes(_some(records)))
    report.facts.append(f"ignored: {left_out / max(left_out + int(pixels.sum()), 1):.2%} of the pixels ({ignored})")
    report.suspect("label maps that cannot be used", len(unusable), unusable, "They are left out in training.")
    report.suspect(f"label maps with labels beyond the {len(names)} classes", len(unknown), unknown)
    report.suspect("label maps without a pixel of any class", len(bare), bare)
    report.compare_classes(names, images.tolist(), "images", is_train)
    return report


def _some(records: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    return records[:: max(1, -(-len(records) // MAX_IMAGES_SEEN))]


def _sizes(records: Sequence[dict[str, Any]]) -> str:
    files = [record["file_name"] for record in records]
    return describe_sizes([image_size(file) for file in files if image_problem(file) is None])
