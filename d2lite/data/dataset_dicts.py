"""Lists of images and annotations from dataset names."""

import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch.utils.data as torchdata
from tabulate import tabulate

from d2lite.data.catalog import DatasetCatalog, MetadataCatalog
from d2lite.data.detection_utils import check_metadata_consistency

logger = logging.getLogger(__name__)

Dicts = list[dict[str, Any]]


def get_detection_dataset_dicts(
    names: str | Sequence[str],
    filter_empty: bool = True,
    min_keypoints: int = 0,
    proposal_files: Sequence[str] | None = None,
    check_consistency: bool = True,
) -> Dicts | torchdata.Dataset:
    """Loads registered datasets and concatenates them.

    Args:
        names: name or names.
        filter_empty: leave out images that have only crowd annotations, or none.
        min_keypoints, proposal_files: left out of d2lite.
        check_consistency: require that all datasets name the same classes, and log the instances per class.

    Raises:
        NotImplementedError: for keypoints or precomputed proposals.
    """
    if min_keypoints > 0:
        raise NotImplementedError("min_keypoints: d2lite has no keypoints; Detectron2 has them")
    if proposal_files:
        raise NotImplementedError("proposal_files: d2lite has no precomputed proposals; Detectron2 has them")
    names = [names] if isinstance(names, str) else list(names)
    assert names, "no dataset names given: set DATASETS.TRAIN or DATASETS.TEST"
    datasets = [DatasetCatalog.get(name) for name in names]
    if isinstance(datasets[0], torchdata.Dataset):
        return _join_torch_datasets(datasets)
    for name, dicts in zip(names, datasets):
        assert len(dicts), f"dataset {name!r} is empty"
    dicts = list(itertools.chain.from_iterable(datasets))
    has_instances = "annotations" in dicts[0]
    if has_instances and filter_empty:
        dicts = filter_images_with_only_crowd_annotations(dicts)
    if check_consistency and has_instances and MetadataCatalog.get(names[0]).get("thing_classes") is not None:
        check_metadata_consistency("thing_classes", names)
        print_instances_class_histogram(dicts, MetadataCatalog.get(names[0]).thing_classes)
    assert dicts, f"no image with an annotation is left in {', '.join(names)}"
    return dicts


def _join_torch_datasets(datasets: list[torchdata.Dataset]) -> torchdata.Dataset:
    """One dataset from several torch datasets, which must be of one kind."""
    if len(datasets) == 1:
        return datasets[0]
    if all(isinstance(d, torchdata.IterableDataset) for d in datasets):
        return torchdata.ChainDataset(datasets)
    return torchdata.ConcatDataset(datasets)


def filter_images_with_only_crowd_annotations(dataset_dicts: Dicts) -> Dicts:
    """The images that have at least one annotation that is not a crowd."""
    kept = [d for d in dataset_dicts if any(a.get("iscrowd", 0) == 0 for a in d["annotations"])]
    removed = len(dataset_dicts) - len(kept)
    logger.info("Removed %d images without usable annotations; %d images are left", removed, len(kept))
    return kept


def print_instances_class_histogram(dataset_dicts: Dicts, class_names: Sequence[str]) -> None:
    """Logs the number of instances of each class; crowd annotations do not count.

    Raises:
        AssertionError: if a category_id is out of the range of the class names.
    """
    counts = Counter(a["category_id"] for d in dataset_dicts for a in d["annotations"] if not a.get("iscrowd", 0))
    n = len(class_names)
    wrong = [c for c in counts if not 0 <= c < n]
    assert not wrong, f"category_id {wrong[0]} is out of range for {n} classes (0 to {n - 1})"
    rows = [(name, counts[k]) for k, name in enumerate(class_names)]
    columns = min(3, max(1, n))
    cells = [value for row in rows for value in row]
    table = [cells[i : i + 2 * columns] for i in range(0, len(cells), 2 * columns)]
    text = tabulate(table, headers=["category", "#instances"] * columns, tablefmt="pipe", stralign="center")
    logger.info("%d instances in %d images:\n%s", sum(counts.values()), len(dataset_dicts), text)
