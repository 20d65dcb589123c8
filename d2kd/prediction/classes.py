"""Names of the classes that a model predicts, and the ids that they have in files of results."""

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from d2kd.data.classes import class_names as names_of_data
from d2kd.data.coco import DatasetError, read_coco
from d2kd.modeling.architectures import architecture_class
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

logger = logging.getLogger(__name__)


class ClassList(NamedTuple):
    """Classes in the model's order: names, ids in files, and colors (RGB) where the data tell some."""

    names: Sequence[str]
    ids: Sequence[int]
    colors: Sequence[Sequence[int]] | None = None


def known_classes(cfg: CfgNode, saved: Mapping[str, Sequence[str]] | None, weights: str) -> dict[str, ClassList]:
    """Returns the classes of a model by kind, "thing_classes" or "stuff_classes".

    Names are those in the checkpoint, or else those of the first dataset of the configuration that tells them, or else
    numbers, with a line in the log. Ids are those of a dataset with the same classes; without one things count from 1,
    as COCO's do, and stuff from 0, as in label maps.

    Args:
        cfg: of the model.
        saved: "class_names" of the checkpoint.
        weights: its path, for the log.
    """
    data = _names_of_data(cfg)
    found = {}
    for count, number in architecture_class(cfg).class_counts(cfg):
        kind = count.metadata
        given = ((saved or {}).get(kind), data.get(kind))
        names = next((list(map(str, n)) for n in given if n is not None and len(n) == number), None)
        if names is None:
            logger.warning(
                "No names of the %d classes are known, neither by %s nor by the datasets of the configuration: classes "
                "are numbered from 0.",
                number,
                weights,
            )
        found[kind] = _with_ids(cfg, kind, names, number)
    return found


def numbered(count: int, first_id: int = 0) -> ClassList:
    """Classes of which nothing but their number is known."""
    return ClassList([str(i) for i in range(count)], range(first_id, first_id + count))


def _names_of_data(cfg: CfgNode) -> dict[str, list[str]]:
    try:
        return names_of_data(cfg)
    except (DatasetError, OSError):  # of a dataset that is not here
        return {}


def _with_ids(cfg: CfgNode, kind: str, names: list[str] | None, number: int) -> ClassList:
    prefix = kind.partition("_")[0]
    first = 1 if kind == "thing_classes" else 0
    if names is None:
        return numbered(number, first)
    for dataset in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if dataset not in DatasetCatalog:
            continue
        meta = MetadataCatalog.get(dataset)
        colors = meta.get(f"{prefix}_colors")
        colors = colors if colors is not None and len(colors) == number else None
        if list(meta.get(kind) or names) != names:
            continue
        places = meta.get(f"{prefix}_dataset_id_to_contiguous_id")
        if places is not None and sorted(places.values()) == list(range(number)):
            return ClassList(names, sorted(places, key=lambda i: places[i]), colors)
        if kind == "thing_classes" and meta.get("json_file") is not None:
            try:
                file = read_coco(meta.json_file, need_annotations=False)
            except (DatasetError, OSError):
                continue
            if file.class_names == names:
                return ClassList(names, [category["id"] for category in file.sorted_categories()], colors)
        elif colors is not None:
            return ClassList(names, range(first, first + number), colors)
    return ClassList(names, range(first, first + number))
