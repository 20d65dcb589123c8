"""Reports on the datasets of a configuration, and on what two of them share."""

import itertools
import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..classes import check_classes
from ..datasets import check_datasets, used_datasets
from .classes import inspect_label_maps, inspect_labels
from .copies import equal_files
from .objects import inspect_objects
from .report import Report


def inspect_datasets(cfg: CfgNode) -> tuple[list[Report], list[str]]:
    """Checks the datasets of a configuration as a training does, and looks at what they hold.

    Args:
        cfg: the datasets of its `DATASETS.REGISTER` must be registered.

    Returns:
        a report on each dataset of DATASETS.TRAIN and TEST; and a line for each two that share images.

    Raises:
        DatasetError: see `check_datasets` and `check_classes`.
        LabelMapError: a label map cannot be read, and is not left out.
    """
    check_datasets(cfg)
    check_classes(cfg)
    names = used_datasets(cfg, ("TRAIN", "TEST"))
    records = {name: DatasetCatalog.get(name) for name in names}
    reports = {name: _inspect(cfg, name, records[name]) for name in names}
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


def _inspect(cfg: CfgNode, name: str, records: Sequence[dict[str, Any]]) -> Report:
    meta, is_train = MetadataCatalog.get(name), name in cfg.DATASETS.TRAIN
    heading = f"{name} (DATASETS.{'TRAIN' if is_train else 'TEST'})"
    first = records[0] if records else {}
    if "label" in first:
        return inspect_labels(heading, records, meta.get("thing_classes", ()), is_train)
    if "annotations" in first:
        return inspect_objects(cfg, heading, records, meta.get("thing_classes", ()), is_train)
    if "sem_seg_file_name" in first:
        names, ignored = meta.get("stuff_classes", ()), meta.get("ignore_label")
        leave_out = is_train and cfg.DATASETS.ON_BAD_IMAGE == "skip"
        return inspect_label_maps(heading, records, names, ignored, is_train, leave_out=leave_out)
    return Report(f"{heading}: {len(records)} records of a kind that is not known here")
