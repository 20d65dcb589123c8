"""Classes: their number in model and data, and their names and order wherever they must agree."""

from collections.abc import Sequence
from typing import Any

from d2kd.data.classification import ClassificationSource
from d2kd.data.coco import DatasetError, read_coco, short
from d2kd.modeling.architectures import architecture_class
from d2kd.modeling.classes import CLASS_NAME_READERS
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from .datasets import used_datasets

#: Names, and their characters in all, that a message shows of one list.
_SHOWN = 12
_LONGEST = 240


def check_classes(cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "TEST")) -> None:
    """Compares the classes of the datasets of some splits with each other, and their number with the model's.

    Done in the main process. Datasets that do not tell their classes without being loaded are not checked.

    Raises:
        DatasetError: if they differ.
    """
    if not comm.is_main_process():
        return
    names = used_datasets(cfg, splits)
    for count, expected in architecture_class(cfg).class_counts(cfg):
        known = {name: classes for name in names if (classes := class_names_of(name, count.metadata)) is not None}
        for name, classes in known.items():
            first = next(iter(known))
            require_same_classes(
                known[first], f"{_split_of(cfg, first)} {first!r}", classes, f"{_split_of(cfg, name)} {name!r}"
            )
            if len(classes) != expected:
                raise DatasetError(
                    f"Dataset {name!r} has {len(classes)} classes {show_classes(classes)}, but {count.key} is "
                    f"{expected}. Set {count.key} to {len(classes)}, or use another dataset."
                )
        if count.metadata == "stuff_classes":
            for name in names:
                _check_ignored(name, MetadataCatalog.get(name).get("ignore_label"), cfg, expected)


def _check_ignored(name: str, label: int | None, cfg: CfgNode, classes: int) -> None:
    """What is no class for the data and one for the model, or the other way round, is learned and scored otherwise."""
    ours = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    if label is not None and label != ours and (0 <= label < classes or 0 <= ours < classes):
        raise DatasetError(
            f"Dataset {name!r} ignores the label {label} (IGNORE), and MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {ours}; of "
            f"both one is the number of a class, of which there are {classes}. Set both to the same."
        )


def require_same_classes(ours: Sequence[str], whose: str, theirs: Sequence[str], other: str) -> None:
    """Compares names of classes and their order; a class is known to a model by its place only.

    Args:
        ours, theirs: in the order of the model's classes.
        whose, other: what has them, for the message.

    Raises:
        DatasetError: they differ.
    """
    difference = class_difference(ours, theirs)
    if not difference:
        return
    raise DatasetError(
        f"{whose} has the classes {show_classes(ours)}, and {other} has {show_classes(theirs)}: {difference}. Give "
        "their categories the same names in the same order (of ids), or use another dataset."
    )


def class_difference(ours: Sequence[str], theirs: Sequence[str]) -> str:
    """Returns how two lists of classes differ, in words; "" for the same."""
    ours, theirs = list(ours), list(theirs)
    if ours == theirs:
        return ""
    if sorted(map(str, ours)) == sorted(map(str, theirs)):
        return "the same names in another order"
    i = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
    return f"they differ from class {i} on"


def show_classes(names: Sequence[str]) -> str:
    """Returns names of classes for a message, the first ones where there are many."""
    more = f", ... {len(names)} in all" if len(names) > _SHOWN else ""
    return f"({short(', '.join(map(str, names[:_SHOWN])), _LONGEST)}{more})"


def class_names_of(dataset: str, kind: str = "thing_classes") -> list[str] | None:
    """Returns the class names of a registered dataset, from its metadata, its COCO file or class folders; else None."""
    meta = MetadataCatalog.get(dataset)
    names = meta.get(kind)
    if names is None and kind == "thing_classes":
        source: Any = DatasetCatalog[dataset] if dataset in DatasetCatalog else None
        if isinstance(source, ClassificationSource):
            names = source.class_names()
        elif meta.get("json_file") is not None:
            names = read_coco(meta.json_file, need_annotations=False).class_names
    return None if names is None else list(names)


def _readable_names(dataset: str, kind: str) -> list[str] | None:
    """As `class_names_of`, but None for a file that cannot be read: the run may not need it, or says so where it does.

    They stay in the metadata, as when the dataset is loaded: a file may take many seconds.
    """
    try:
        names = class_names_of(dataset, kind)
    except DatasetError:
        return None
    if names is not None and MetadataCatalog.get(dataset).get(kind) is None:
        MetadataCatalog.get(dataset).set(**{kind: names})
    return names


CLASS_NAME_READERS.append(_readable_names)


def class_names(cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "TEST")) -> dict[str, list[str]]:
    """Returns the names of the classes that a model is configured for, by kind, as the first of its datasets tells.

    Kinds that no dataset tells are left out, and so are files that are not there.
    """
    found = {}
    for kind in dict.fromkeys(count.metadata for count, _ in architecture_class(cfg).class_counts(cfg)):
        for name in used_datasets(cfg, splits):
            names = _readable_names(name, kind) if name in DatasetCatalog else None
            if names is not None:
                found[kind] = names
                break
    return found


def share_class_names(cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "TEST")) -> None:
    """Lets every process know, in the metadata, what the main one has learned when it checked the datasets."""
    kinds = ("thing_classes", "stuff_classes")
    used = [name for name in used_datasets(cfg, splits) if name in DatasetCatalog]
    known = comm.all_gather([(n, k, MetadataCatalog.get(n).get(k)) for n in used for k in kinds])[0]
    for name, kind, names in known:
        if names is not None and MetadataCatalog.get(name).get(kind) is None:
            MetadataCatalog.get(name).set(**{kind: names})


def _split_of(cfg: CfgNode, name: str) -> str:
    return f"DATASETS.{'TRAIN' if name in cfg.DATASETS.TRAIN else 'TEST'}"
