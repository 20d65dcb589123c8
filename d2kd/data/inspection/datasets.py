"""Reports on the datasets of a configuration, and on what two of them share."""

import itertools
import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..classes import check_classes
from ..datasets import check_datasets, used_datasets
from ..images import LabelRange
from ..mapper import label_range
from .classes import inspect_label_maps, inspect_labels
from .copies import equal_files
from .decoding import refuse, unusable_images
from .objects import inspect_objects
from .report import Report


def inspect_datasets(cfg: CfgNode, quick: bool = False) -> tuple[list[Report], list[str]]:
    """Checks the datasets of a configuration as a training does, and looks at what they hold.

    Args:
        cfg: the datasets of its `DATASETS.REGISTER` must be registered.
        quick: look at the first and last bytes of images only, as a training does before it starts, and at up to
            `MAX_IMAGES_SEEN` label maps, instead of decoding all.

    Returns:
        a report on each dataset of DATASETS.TRAIN and TEST; and a line for each two that share images.

    Raises:
        DatasetError: see `check_datasets` and `check_classes`; or a file cannot be used, and is not left out.
    """
    check_datasets(cfg)
    check_classes(cfg)
    names = used_datasets(cfg, ("TRAIN", "TEST"))
    records = {name: DatasetCatalog.get(name) for name in names}
    reports = {name: _inspect(cfg, name, records[name], quick) for name in names}
    for name in () if quick else names:
        _decode(cfg, name, records[name], reports[name])
    groups = equal_files({name: [r["file_name"] for r in records[name]] for name in names})
    for name, report in reports.items():
        copies = [[file for owner, file in group if owner == name] for group in groups]
        repeated = [os.path.basename(file) for group in copies for file in group[1:]]
        report.suspect("images with the content of another one", len(repeated), repeated)
    shared = []
    for first, second in itertools.combinations(names, 2):
        common = [group for group in groups if {first, second} <= {name for name, _ in group}]
        if common:
            files = [next(file for name, file in common[0] if name == dataset) for dataset in (first, second)]
            is_leak = (first in cfg.DATASETS.TRAIN) != (second in cfg.DATASETS.TRAIN)
            effect = " What is scored on them tells nothing: the model has seen them." if is_leak else ""
            shared.append(f"Images in {first} and in {second}: {len(common)}, first {' and '.join(files)}.{effect}")
    return list(reports.values()), shared


def _decode(cfg: CfgNode, name: str, records: Sequence[dict[str, Any]], report: Report) -> None:
    labels = label_range(cfg) if name in cfg.DATASETS.TRAIN else None
    problems = unusable_images(name, records, labels)
    if not _leaves_out(cfg, name):
        refuse(problems, len(records), name in cfg.DATASETS.TRAIN)
    files = map(os.path.basename, problems)
    report.suspect(
        "images that cannot be used", len(problems), files, "They are left out in training.", total=len(records)
    )


def _leaves_out(cfg: CfgNode, name: str) -> bool:
    """Whether files of a dataset that cannot be used are left out of all that is done with it."""
    return name not in cfg.DATASETS.TEST and cfg.DATASETS.ON_BAD_IMAGE == "skip"


def _inspect(cfg: CfgNode, name: str, records: Sequence[dict[str, Any]], quick: bool) -> Report:
    meta, is_train = MetadataCatalog.get(name), name in cfg.DATASETS.TRAIN
    heading = f"{name} (DATASETS.{'TRAIN' if is_train else 'TEST'})"
    first = records[0] if records else {}
    if "label" in first:
        return inspect_labels(heading, records, meta.get("thing_classes", ()), is_train)
    if "annotations" in first:
        return inspect_objects(cfg, heading, records, meta.get("thing_classes", ()), is_train)
    if "sem_seg_file_name" in first:
        names, ignored = meta.get("stuff_classes", ()), meta.get("ignore_label")
        labels = label_range(cfg) if is_train else LabelRange(len(names), ignored) if names else None
        return inspect_label_maps(
            heading,
            records,
            names,
            ignored,
            is_train,
            labels=labels,
            leave_out=_leaves_out(cfg, name),
            quick=quick,
        )
    return Report(f"{heading}: {len(records)} records of a kind that is not known here")
