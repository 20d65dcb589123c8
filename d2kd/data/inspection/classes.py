"""Images with one label each, and label maps: how many of each class."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..coco.image_files import MAX_IMAGES_SEEN
from ..images import LabelMapError, image_problem, image_size, read_label_map
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
    leave_out: bool = False,
) -> Report:
    """Reports on a dataset for semantic segmentation: `records` with "sem_seg_file_name", of which up to
    `MAX_IMAGES_SEEN` label maps are read; see `inspect_objects`.

    Args:
        ignored: the label that does not count.
        leave_out: label maps that cannot be read are told of only: training goes without them.

    Raises:
        LabelMapError: a label map cannot be read.
    """
    seen = _some(records)
    pixels = np.zeros(len(names), dtype=np.int64)
    images = np.zeros(len(names), dtype=int)
    left_out, unreadable, unknown, bare = 0, [], [], []
    for record in seen:
        try:
            labels, counts = np.unique(read_label_map(record["sem_seg_file_name"]), return_counts=True)
        except LabelMapError:
            if not leave_out:
                raise
            unreadable.append(record["sem_seg_file_name"])
            continue
        known = (labels >= 0) & (labels < len(names)) & (labels != (-1 if ignored is None else ignored))
        pixels[labels[known]] += counts[known]
        images[labels[known]] += 1
        left_out += int(counts[labels == ignored].sum()) if ignored is not None else 0
        unknown += [record["sem_seg_file_name"]] if (~known & (labels != ignored)).any() else []
        bare += [] if known.any() else [record["sem_seg_file_name"]]
    total = max(int(pixels.sum()), 1)
    read = "" if len(seen) == len(records) else f", of which {len(seen)} were read"
    report = Report(f"{name}: {len(records)} images with label maps of {len(names)} classes{read}")
    report.columns = ["class", "pixels", "images"]
    report.rows = [[n, f"{p / total:.2%}", i] for n, p, i in zip(names, pixels.tolist(), images.tolist())]
    report.facts.append(_sizes(seen))
    report.facts.append(f"ignored: {left_out / max(left_out + int(pixels.sum()), 1):.2%} of the pixels ({ignored})")
    report.suspect("label maps that cannot be read", len(unreadable), unreadable, "They are left out in training.")
    report.suspect(f"label maps with labels beyond the {len(names)} classes", len(unknown), unknown)
    report.suspect("label maps without a pixel of any class", len(bare), bare)
    report.compare_classes(names, images.tolist(), "images", is_train)
    return report


def _some(records: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    return records[:: max(1, -(-len(records) // MAX_IMAGES_SEEN))]


def _sizes(records: Sequence[dict[str, Any]]) -> str:
    files = [record["file_name"] for record in records]
    return describe_sizes([image_size(file) for file in files if image_problem(file) is None])
