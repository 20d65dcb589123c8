"""Datasets named in the configuration: their formats, registering them, and checking what a run will read."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from d2kd.data.class_list import class_names, optional_class_names
from d2kd.data.classification import (
    ClassificationSource,
    Cub200,
    ImageFolders,
    check_classification,
    register_builtin,
    register_source,
    same_split,
)
from d2kd.data.coco import CocoSummary, DatasetError, load_coco, validate_coco_json
from d2kd.data.conversion import (
    ConvertedSource,
    VocAnnotations,
    YoloClasses,
    YoloLabels,
    use_of_difficult,
    voc_first_pixel,
    voc_split,
    yolo_classes,
)
from d2kd.data.segmentation import LabelMaps, ignored_label, label_suffix
from d2kd.errors import did_you_mean, require_choice
from d2kd.modeling.architectures import architecture_class
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

__all__ = [
    "DATASET_FORMATS",
    "DatasetError",
    "DatasetFormat",
    "check_datasets",
    "register_dataset_format",
    "register_datasets",
    "used_datasets",
]

logger = logging.getLogger(__name__)


class DatasetFormat(NamedTuple):
    """A format that datasets in `DATASETS.REGISTER` may have."""

    #: Keys of an entry with paths, beside NAME and FORMAT.
    paths: tuple[str, ...]
    #: Registers a dataset in Detectron2's catalogs: called with its name, the paths, and the words of `choices`, in the
    #: order of the keys.
    register: Callable[..., None]
    #: Words that further keys of an entry may have, by key.
    choices: Mapping[str, Sequence[str]] = {}
    #: Further keys, each with what reads its value: called with the key in full and the value, None where there is
    #: none, it returns what `register` gets behind the words, or raises `DatasetError`.
    values: Mapping[str, Callable[[str, Any], Any]] = {}

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of an entry that must be strings, beside NAME and FORMAT."""
        return (*self.paths, *self.choices)


#: Formats by the value of FORMAT; see `register_dataset_format`.
DATASET_FORMATS: dict[str, DatasetFormat] = {}


def register_dataset_format(
    name: str,
    paths: Sequence[str],
    choices: Mapping[str, Sequence[str]] | None = None,
    values: Mapping[str, Callable[[str, Any], Any]] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function as the `DatasetFormat` of that name; a decorator.

    >>> @register_dataset_format("kitti", paths=("LABELS", "IMAGES"))
    ... def register_kitti(name: str, labels: str, images: str) -> None:
    ...     DatasetCatalog.register(name, lambda: read_kitti(labels, images))
    ...     MetadataCatalog.get(name).set(evaluator_type="coco", thing_classes=[...])

    Args:
        name: what `FORMAT` calls it.
        paths: keys of an entry that hold paths.
        choices: further keys, each with the words that it may have.
        values: further keys, each with what reads its value, see `DatasetFormat.values`.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        DATASET_FORMATS[name] = DatasetFormat(tuple(paths), function, dict(choices or {}), dict(values or {}))
        return function

    return register


@register_dataset_format("coco", paths=("JSON", "IMAGES"))
def register_coco(name: str, json_file: str, images: str) -> None:
    """Registers a COCO instances file."""
    DatasetCatalog.register(name, lambda: load_coco(json_file, images, name))
    MetadataCatalog.get(name).set(json_file=json_file, image_root=images, evaluator_type="coco")


@register_dataset_format("yolo", paths=("IMAGES", "LABELS"), values={"CLASSES": yolo_classes})
def register_yolo(name: str, images: str, labels: str, classes: YoloClasses) -> None:
    """Registers a folder of images and one of their label files, as the YOLO family has them."""
    YoloLabels(name, images, labels, classes).register()


@register_dataset_format(
    "voc",
    paths=("ROOT",),
    values={
        "SPLIT": voc_split,
        "CLASSES": optional_class_names,
        "FIRST_PIXEL": voc_first_pixel,
        "DIFFICULT": use_of_difficult,
    },
)
def register_voc(name: str, root: str, split: str, classes: list[str] | None, first_pixel: int, difficult: str) -> None:
    """Registers a split of a folder in the form of Pascal VOC."""
    VocAnnotations(name, root, split, classes, first_pixel, difficult).register()


@register_dataset_format("folders", paths=("IMAGES",))
def register_folders(name: str, images: str) -> None:
    """Registers a folder that holds one folder of images a class, for image classification."""
    register_source(ImageFolders(name, images), images)


@register_dataset_format("cub", paths=("ROOT",), choices={"SPLIT": ("train", "test")})
def register_cub(name: str, root: str, split: str) -> None:
    """Registers a part of CUB-200-2011, from its archive's folder."""
    register_source(Cub200(name, root, split), os.path.join(root, "images"))


@register_dataset_format(
    "labelmaps",
    paths=("IMAGES", "LABELS"),
    values={"CLASSES": class_names, "IGNORE": ignored_label, "LABEL_SUFFIX": label_suffix},
)
def register_label_maps(name: str, images: str, labels: str, classes: list[str], ignored: int, suffix: str) -> None:
    """Registers a folder of images and one of their label maps, for semantic segmentation."""
    DatasetCatalog.register(name, LabelMaps(name, images, labels, suffix))
    MetadataCatalog.get(name).set(
        evaluator_type="sem_seg", image_root=images, sem_seg_root=labels, stuff_classes=classes, ignore_label=ignored
    )


register_builtin(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))

#: What was registered from configurations: format and paths by name.
_registered: dict[str, tuple[str, ...]] = {}


def register_datasets(cfg: CfgNode) -> None:
    """Registers the datasets of `DATASETS.REGISTER`: [{NAME, JSON, IMAGES}, {NAME, FORMAT: folders, IMAGES}, ...].

    A relative path is taken from the working directory, or else from the folder `DETECTRON2_DATASETS` (default:
    datasets). Files need not be there yet: `check_datasets` looks for those that are used. Registering the same again
    does nothing.

    Raises:
        DatasetError: if an entry is malformed, or its name is taken by another dataset.
    """
    if not isinstance(cfg.DATASETS.REGISTER, (list, tuple)):
        raise DatasetError(f"DATASETS.REGISTER is {cfg.DATASETS.REGISTER!r}; it must be a list of mappings.")
    for i, entry in enumerate(cfg.DATASETS.REGISTER):
        where = f"DATASETS.REGISTER[{i}]"
        kind = _format_of(where, entry)
        name, paths = entry["NAME"], [_candidates(entry[key])[0] for key in kind.paths]
        words = [entry[key] for key in kind.choices]
        values = [read(f"{where}.{key}", entry.get(key)) for key, read in kind.values.items()]
        wanted = (entry.get("FORMAT", "coco"), *map(os.path.abspath, paths), *words, *map(str, values))
        if name not in DatasetCatalog:
            kind.register(name, *paths, *words, *values)
            _registered[name] = wanted
            logger.info("Registered dataset %s: %s", name, ", ".join([*paths, *words]))
        elif _existing(name) != wanted:
            raise DatasetError(
                f"{where}: dataset {name!r} exists already, as {' '.join(_existing(name))}; it cannot become "
                f"{' '.join(wanted)}. Choose another NAME."
            )


def _existing(name: str) -> tuple[str, ...]:
    """Format and paths of a registered dataset, also of one that Detectron2 or other code has registered."""
    source: Any = DatasetCatalog[name]
    if isinstance(source, ClassificationSource):
        return source.definition
    meta = MetadataCatalog.get(name)
    coco = ("coco", *(os.path.abspath(path) for path in (meta.get("json_file"), meta.get("image_root")) if path))
    return _registered.get(name, coco)


def _format_of(where: str, entry: Any) -> DatasetFormat:
    """The format of an entry, whose keys are checked."""
    if not isinstance(entry, dict):
        raise DatasetError(f"{where} must be a mapping with NAME, JSON, IMAGES, got {entry!r}.")
    require_choice(f"{where}.FORMAT", entry.get("FORMAT", "coco"), DATASET_FORMATS)
    kind = DATASET_FORMATS[entry.get("FORMAT", "coco")]
    needed = ("NAME", *kind.keys)
    known = (*needed, *kind.values)
    for key in entry:
        if key not in (*known, "FORMAT"):
            raise DatasetError(
                f"{where} has the unknown key {key!r}; it takes {', '.join(known)}.{did_you_mean(key, known)}"
            )
    for key in needed:
        if not isinstance(entry.get(key), str) or not entry[key]:
            has = f"{key} = {entry[key]!r}" if key in entry else f"no {key}"
            raise DatasetError(f"{where} has {has}. Each entry needs {', '.join(needed)}, all of them strings.")
    for key, words in kind.choices.items():
        require_choice(f"{where}.{key}", entry[key], words)
    return kind


def _candidates(path: str) -> list[str]:
    """Places where a path may be, the existing one first; of `val` and `valid` also the other, if that one exists."""
    path = os.path.expanduser(path)
    places = [path]
    if not os.path.isabs(path) and "://" not in path:
        root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
        places = sorted([path, os.path.join(root, path)], key=lambda p: not PathManager.exists(p))
    if PathManager.exists(places[0]):
        return places
    return [*(other for place in places for other in same_split(place)), *places]


def check_datasets(cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "TEST")) -> None:
    """Checks the annotation files of all datasets that a run reads, in the main process.

    Args:
        cfg: the config; datasets of `DATASETS.REGISTER` must be registered.
        splits: "TRAIN", "TEST" or both.

    Raises:
        DatasetError: if a dataset is not registered, is none for the model, its COCO file is not sound (see
            `validate_coco_json`), its class folders are not (see `check_classification`), or there is nothing to train
            on or to judge by.
    """
    if not comm.is_main_process():
        return
    for split in splits:
        summaries = {name: _check_dataset(cfg, name, split) for name in dict.fromkeys(cfg.DATASETS[split])}
        _check_objects(cfg, split, summaries)


def require_dataset(cfg: CfgNode, name: str, split: str) -> None:
    """Checks that a dataset is registered, and that there are the files that DATASETS.REGISTER names.

    Raises:
        DatasetError: it is not, or a file is not there.
    """
    given = {e["NAME"]: e for e in cfg.DATASETS.REGISTER}
    if name not in DatasetCatalog:
        raise DatasetError(
            f"Dataset {name!r} of DATASETS.{split} is not registered. Correct the name, or add it to "
            f"DATASETS.REGISTER.{did_you_mean(name, DatasetCatalog.list())}"
        )
    for key in _format_of("DATASETS.REGISTER", given[name]).paths if name in given else ():
        _check_exists(f"{key} of dataset {name!r} (DATASETS.REGISTER)", given[name][key])


def _require_kind(cfg: CfgNode, name: str, split: str) -> None:
    """A model that classifies images needs images with one label each, and others cannot use them."""
    architecture, kind = architecture_class(cfg), MetadataCatalog.get(name).get("evaluator_type")
    if architecture.CLASSIFIES_IMAGES and kind not in (None, "classification"):
        raise DatasetError(
            f"Dataset {name!r} of DATASETS.{split} has the evaluator type {kind!r}, and MODEL.META_ARCHITECTURE "
            f"{cfg.MODEL.META_ARCHITECTURE} classifies whole images: it needs one of FORMAT folders or cub, or another "
            "whose evaluator type is 'classification'."
        )
    if kind == "classification" and architecture.KNOWN and not architecture.CLASSIFIES_IMAGES:
        raise DatasetError(
            f"Dataset {name!r} of DATASETS.{split} has images with one label each, for classification, and "
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}: use another dataset, or ImageClassifier."
        )


def _check_dataset(cfg: CfgNode, name: str, split: str) -> CocoSummary | None:
    """Checks one dataset; returns what it holds, or None for those that are no COCO files."""
    require_dataset(cfg, name, split)
    _require_kind(cfg, name, split)
    meta, is_train = MetadataCatalog.get(name), split == "TRAIN"
    missing_images = "warn" if is_train and cfg.DATASETS.ON_BAD_IMAGE == "skip" else "error"
    if meta.get("evaluator_type") == "classification" or architecture_class(cfg).CLASSIFIES_IMAGES:
        _check_labeled_images(cfg, name, is_train, missing_images)
        return None
    source: Any = DatasetCatalog[name]
    if isinstance(source, LabelMaps):
        pairs = source.check(leave_out=missing_images == "warn")
        logger.info("Checked dataset %s: %d images with label maps, %d classes", name, pairs, len(meta.stuff_classes))
        return None
    if meta.get("json_file") is None or meta.get("image_root") is None:
        return None
    converted = isinstance(source, ConvertedSource)
    if converted:
        source.forget()
    masks = (cfg.INPUT.MASK_FORMAT if is_train else "any") if cfg.MODEL.MASK_ON else ""
    summary = validate_coco_json(
        meta.json_file,
        meta.image_root,
        need_annotations=is_train,
        missing_images=missing_images,
        masks=masks,
        evaluated=not is_train,
        as_it_stands=not converted and _registered.get(name, ("",))[0] != "coco",
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
    return summary


def _check_labeled_images(cfg: CfgNode, name: str, is_train: bool, missing_images: str) -> None:
    inputs, meta = cfg.INPUT.CLASSIFICATION, MetadataCatalog.get(name)
    size = inputs.SIZE if is_train else int((inputs.TEST_SIZE or inputs.SIZE) / inputs.CROP_PCT)
    summary = check_classification(name, missing_images=missing_images, size=size, is_train=is_train)
    if meta.get("thing_classes") is None and summary.class_names:
        meta.thing_classes = list(summary.class_names)
    logger.info(
        "Checked dataset %s: %d images, %d classes, in %s",
        name,
        summary.num_images,
        len(summary.class_names),
        meta.get("image_root"),
    )


def _check_objects(cfg: CfgNode, split: str, summaries: Mapping[str, CocoSummary | None]) -> None:
    """Training needs objects, and so does a metric that decides on checkpoints and on the end of the training."""
    known = {name: summary for name, summary in summaries.items() if summary is not None}
    empty = {name: summary for name, summary in known.items() if not summary.num_objects}
    if split == "TRAIN" and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS and empty and len(empty) == len(summaries):
        raise DatasetError(
            f"DATASETS.TRAIN {tuple(summaries)} cannot be trained on: {_no_objects(empty)}. Check the annotation "
            "files, or set DATALOADER.FILTER_EMPTY_ANNOTATIONS False to train on empty images too."
        )
    metric = cfg.TEST.BEST_CHECKPOINT.METRIC
    judged = [name for name in empty if len(summaries) == 1 or metric.startswith((f"{name}/", f"{name}_EMA/"))]
    if split == "TEST" and metric and judged:
        raise DatasetError(
            f"TEST.BEST_CHECKPOINT.METRIC is {metric!r}, which tells nothing on DATASETS.TEST: "
            f"{_no_objects({name: empty[name] for name in judged})}. Choose another test set, or set the metric to ''."
        )
    if split == "TEST" and empty:
        logger.warning("AP will tell nothing: %s", _no_objects(empty))


def _no_objects(summaries: Mapping[str, CocoSummary]) -> str:
    def describe(summary: CocoSummary) -> str:
        if not summary.num_annotations:
            return "there are no annotations"
        all_crowds = summary.num_crowds == summary.num_annotations
        return f"all {summary.num_annotations} annotations have iscrowd 1{'' if all_crowds else ' or an empty box'}"

    return "; ".join(f"{describe(summary)} in {name}" for name, summary in summaries.items())


def used_datasets(cfg: CfgNode, splits: Sequence[str]) -> list[str]:
    """Returns the names of the datasets of some splits, each once."""
    return list(dict.fromkeys(name for split in splits for name in cfg.DATASETS[split]))


def _check_exists(what: str, path: str) -> None:
    candidates = _candidates(path)
    if not PathManager.exists(candidates[0]):
        raise DatasetError(
            f"{what} does not exist; tried {' and '.join(os.path.abspath(p) for p in candidates)}, and beside the YAML "
            "that names it. Correct the path, or set DETECTRON2_DATASETS to the folder that it is relative to."
        )
    if os.path.basename(os.path.normpath(candidates[0])) != os.path.basename(os.path.normpath(path)):
        logger.info("%s: there is no %s, and %s is taken", what, path, candidates[0])
