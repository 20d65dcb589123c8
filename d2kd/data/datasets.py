"""Datasets named in the config: registering COCO files, and checking everything that a run will read."""

import logging
import os
from collections.abc import Sequence
from typing import Any

from d2kd.data.bad_images import wrap_mapper
from d2kd.data.coco_check import DatasetError, validate_coco_json
from d2kd.errors import did_you_mean
from d2kd.modeling.architectures import architecture_class
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

__all__ = [
    "DatasetError",
    "check_class_counts",
    "check_datasets",
    "register_datasets",
    "validate_coco_json",
    "wrap_mapper",
]

logger = logging.getLogger(__name__)

_KEYS = ("NAME", "JSON", "IMAGES")


def register_datasets(cfg: CfgNode) -> None:
    """Registers the COCO files of `DATASETS.REGISTER`, [{NAME, JSON, IMAGES}, ...].

    A relative path is taken from the working directory, or else from the folder `DETECTRON2_DATASETS` (default:
    datasets). Files need not be there yet: `check_datasets` looks for those that are used. Registering the same again
    does nothing.

    Raises:
        DatasetError: if an entry is malformed, or its name is taken by another dataset.
    """
    for i, entry in enumerate(cfg.DATASETS.REGISTER):
        name, json_file, images = _entry_values(f"DATASETS.REGISTER[{i}]", entry)
        json_file, images = _candidates(json_file)[0], _candidates(images)[0]
        if name not in DatasetCatalog:
            register_coco_instances(name, {}, json_file, images)
            logger.info("Registered dataset %s: %s, images in %s", name, json_file, images)
            continue
        meta = MetadataCatalog.get(name)
        taken = (meta.get("json_file"), meta.get("image_root"))
        if [p and os.path.abspath(p) for p in taken] != [os.path.abspath(p) for p in (json_file, images)]:
            raise DatasetError(
                f"DATASETS.REGISTER[{i}]: dataset {name!r} exists already, with annotations {taken[0]} and images "
                f"{taken[1]}; it cannot become {json_file} with {images}. Choose another NAME."
            )


def _entry_values(where: str, entry: Any) -> tuple[str, str, str]:
    """NAME, JSON and IMAGES of an entry."""
    if not isinstance(entry, dict):
        raise DatasetError(f"{where} must be a mapping with {', '.join(_KEYS)}, got {entry!r}.")
    for key in entry:
        if key not in _KEYS:
            raise DatasetError(
                f"{where} has the unknown key {key!r}; it takes {', '.join(_KEYS)}.{did_you_mean(key, _KEYS)}"
            )
    for key in _KEYS:
        if not isinstance(entry.get(key), str) or not entry[key]:
            has = f"{key} = {entry[key]!r}" if key in entry else f"no {key}"
            raise DatasetError(f"{where} has {has}. Each entry needs {', '.join(_KEYS)}, all of them strings.")
    return entry["NAME"], entry["JSON"], entry["IMAGES"]


def _candidates(path: str) -> list[str]:
    """Places where a path may be, the existing one first."""
    path = os.path.expanduser(path)
    if os.path.isabs(path) or "://" in path:
        return [path]
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    return sorted([path, os.path.join(root, path)], key=lambda p: not PathManager.exists(p))


def check_datasets(cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "TEST")) -> None:
    """Checks the annotation files of all datasets that a run reads, in the main process.

    Args:
        cfg: the config; datasets of `DATASETS.REGISTER` must be registered.
        splits: "TRAIN", "TEST" or both.

    Raises:
        DatasetError: if a dataset is not registered, or its COCO file is not sound (see `validate_coco_json`).
    """
    if not comm.is_main_process():
        return
    given = {e["NAME"]: e for e in cfg.DATASETS.REGISTER}
    for name, is_train in _used_datasets(cfg, splits).items():
        if name not in DatasetCatalog:
            raise DatasetError(
                f"Dataset {name!r} of DATASETS.{'TRAIN' if is_train else 'TEST'} is not registered. Correct the name, "
                f"or add it to DATASETS.REGISTER.{did_you_mean(name, DatasetCatalog.list())}"
            )
        for key in ("JSON", "IMAGES") if name in given else ():
            _check_exists(f"{key} of dataset {name!r} (DATASETS.REGISTER)", given[name][key])
        meta = MetadataCatalog.get(name)
        if meta.get("json_file") is None or meta.get("image_root") is None:
            continue
        summary = validate_coco_json(
            meta.json_file,
            meta.image_root,
            need_annotations=is_train,
            missing_images="warn" if is_train and cfg.DATASETS.ON_BAD_IMAGE == "skip" else "error",
        )
        if meta.get("thing_classes") is None:
            # What loading would set; known now, it need not be read again.
            meta.thing_classes = summary.class_names
        logger.info(
            "Checked dataset %s: %d images, %d annotations, %d classes",
            name,
            summary.num_images,
            summary.num_annotations,
            len(summary.class_names),
        )


def _used_datasets(cfg: CfgNode, splits: Sequence[str]) -> dict[str, bool]:
    """Names of the datasets of the splits, and whether each is trained on."""
    train = dict.fromkeys(cfg.DATASETS.TRAIN if "TRAIN" in splits else (), True)
    test = dict.fromkeys(cfg.DATASETS.TEST if "TEST" in splits else (), False)
    return {**test, **train}


def _check_exists(what: str, path: str) -> None:
    candidates = _candidates(path)
    if not PathManager.exists(candidates[0]):
        raise DatasetError(
            f"{what} does not exist; tried {' and '.join(os.path.abspath(p) for p in candidates)}. Correct the "
            "path, or set DETECTRON2_DATASETS to the folder that it is relative to."
        )


def check_class_counts(cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "TEST")) -> None:
    """Compares the number of classes of the model with those of its datasets, in the main process.

    Datasets that do not tell their classes without being loaded are not checked.

    Raises:
        DatasetError: if they differ.
    """
    if not comm.is_main_process():
        return
    for count, expected in architecture_class(cfg).class_counts(cfg):
        for name in _used_datasets(cfg, splits):
            classes = _class_names(name, count.metadata)
            if classes is not None and len(classes) != expected:
                raise DatasetError(
                    f"Dataset {name!r} has {len(classes)} classes ({', '.join(map(str, classes[:5]))}"
                    f"{', ...' if len(classes) > 5 else ''}), but {count.key} is {expected}. Set {count.key} to "
                    f"{len(classes)}, or use another dataset."
                )


def _class_names(name: str, kind: str) -> Any:
    """Class names of a dataset from its metadata or else its COCO file; None if neither tells."""
    meta = MetadataCatalog.get(name)
    names = meta.get(kind)
    if names is None and kind == "thing_classes" and meta.get("json_file") is not None:
        names = validate_coco_json(meta.json_file, need_annotations=False).class_names
    return names
