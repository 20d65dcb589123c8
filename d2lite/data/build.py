"""Data loaders from a config or a dataset."""

import logging
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.utils.data as torchdata

from d2lite.config import CfgNode, configurable
from d2lite.data.common import AspectRatioGroupedDataset, DatasetFromList, MapDataset
from d2lite.data.dataset_dicts import (
    filter_images_with_only_crowd_annotations,
    get_detection_dataset_dicts,
    print_instances_class_histogram,
)
from d2lite.data.dataset_mapper import DatasetMapper
from d2lite.data.samplers import (
    InferenceSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from d2lite.utils import comm
from d2lite.utils.env import seed_all_rng

__all__ = ["build_batch_data_loader", "build_detection_train_loader", "build_detection_test_loader"]
__all__ += ["trivial_batch_collator", "worker_init_reset_seed"]
# known by this place too
__all__ += ["filter_images_with_only_crowd_annotations", "get_detection_dataset_dicts"]
__all__ += ["print_instances_class_histogram"]

logger = logging.getLogger(__name__)

# --- Training -------------------------------------------------------------------------------------


def _train_loader_from_config(
    cfg: CfgNode,
    mapper: Callable[[dict], Any] | None = None,
    *,
    dataset: Any | None = None,
    sampler: torchdata.Sampler | None = None,
) -> dict[str, Any]:
    if dataset is None:
        _check_supported(cfg)
        dataset = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    if sampler is None and not _is_stream(dataset):
        sampler = _training_sampler(cfg.DATALOADER, dataset)
    return {
        "dataset": dataset,
        "sampler": sampler,
        "mapper": DatasetMapper(cfg, True) if mapper is None else mapper,
        "total_batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "aspect_ratio_grouping": cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
    }


def _training_sampler(node: CfgNode, dataset: Sequence[Any]) -> torchdata.Sampler:
    """The sampler that DATALOADER.SAMPLER_TRAIN names."""
    name = node.SAMPLER_TRAIN
    logger.info("Using training sampler %s", name)
    if name == "TrainingSampler":
        return TrainingSampler(len(dataset))
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dataset, node.REPEAT_THRESHOLD, sqrt=node.REPEAT_SQRT
        )
        return RepeatFactorTrainingSampler(factors)
    if name == "RandomSubsetTrainingSampler":
        if "RANDOM_SUBSET_RATIO" not in node:
            raise ValueError(f"{name} needs DATALOADER.RANDOM_SUBSET_RATIO, the share of the images to use")
        return RandomSubsetTrainingSampler(len(dataset), node.RANDOM_SUBSET_RATIO)
    raise ValueError(
        f"DATALOADER.SAMPLER_TRAIN is {name!r}; d2lite has TrainingSampler, RepeatFactorTrainingSampler and "
        "RandomSubsetTrainingSampler"
    )


@configurable(from_config=_train_loader_from_config)
def build_detection_train_loader(
    dataset: list[Any] | torchdata.Dataset,
    *,
    mapper: Callable[[dict], Any] | None,
    sampler: torchdata.Sampler | None = None,
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    **kwargs: Any,
) -> Iterable[list[dict]]:
    """Endless batches for training; also called as `build_detection_train_loader(cfg)`.

    Args:
        dataset: a list of dataset dicts, or a dataset (map-style or iterable).
        mapper: turns a dataset dict into what the model takes; None uses the dicts as they are.
        sampler: the order; a random one when None. An iterable dataset has none.
        total_batch_size: images per batch over all processes.
        aspect_ratio_grouping: batch images that are all wide or all not.
        num_workers: loading processes per training process.
        collate_fn: turns the list of mapped dicts into a batch; the list itself when None.
        kwargs: for `build_batch_data_loader`.
    """
    dataset, sampler = _mapped_and_ordered(dataset, mapper, sampler, TrainingSampler)
    kwargs.update(aspect_ratio_grouping=aspect_ratio_grouping, num_workers=num_workers, collate_fn=collate_fn)
    return build_batch_data_loader(dataset, sampler, total_batch_size, **kwargs)


def build_batch_data_loader(
    dataset: torchdata.Dataset,
    sampler: torchdata.Sampler | None,
    total_batch_size: int,
    *,
    aspect_ratio_grouping: bool = False,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    drop_last: bool = True,
    single_gpu_batch_size: int | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Iterable[list[Any]]:
    """Batches of a dataset in the order of a sampler.

    Args:
        dataset: map-style, or iterable with `sampler` None.
        sampler: gives the indices of this process.
        total_batch_size: images per batch over all processes; must be divisible by their number.
        aspect_ratio_grouping: see `AspectRatioGroupedDataset`.
        num_workers: loading processes.
        collate_fn: turns the list of elements into a batch; the list itself when None.
        drop_last: drop an incomplete last batch.
        single_gpu_batch_size: images per batch of this process, instead of `total_batch_size`.
        seed: of the loader's generator, from which the workers are seeded.
        kwargs: for `torch.utils.data.DataLoader`.
    """
    batch_size = _batch_size(total_batch_size, single_gpu_batch_size)
    _check_order(dataset, sampler)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    if num_workers == 0:
        # The DataLoader rejects options that apply to workers only.
        kwargs = {k: v for k, v in kwargs.items() if k not in ("prefetch_factor", "persistent_workers")}
    kwargs.update(num_workers=num_workers, worker_init_fn=worker_init_reset_seed, generator=generator)
    if not aspect_ratio_grouping:
        kwargs.update(drop_last=drop_last, collate_fn=collate_fn or trivial_batch_collator)
        return torchdata.DataLoader(dataset, batch_size, sampler=sampler, **kwargs)
    # Single elements leave the workers, as the group of an image decides its batch.
    images = torchdata.DataLoader(dataset, sampler=sampler, collate_fn=operator.itemgetter(0), **kwargs)
    batches = AspectRatioGroupedDataset(images, batch_size)
    return batches if collate_fn is None else MapDataset(batches, collate_fn)


def _batch_size(total: int, single: int | None) -> int:
    """Images per batch of this process."""
    if single:
        return single
    world_size = comm.get_world_size()
    assert total > 0 and total % world_size == 0, (
        f"the total batch size ({total}) must be positive and divisible by the {world_size} processes"
    )
    return total // world_size


# --- Inference ------------------------------------------------------------------------------------


def _test_loader_from_config(
    cfg: CfgNode, dataset_name: str | Sequence[str], mapper: Callable[[dict], Any] | None = None
) -> dict[str, Any]:
    _check_supported(cfg)
    dataset = get_detection_dataset_dicts(dataset_name, filter_empty=False)
    return {
        "dataset": dataset,
        "mapper": DatasetMapper(cfg, False) if mapper is None else mapper,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "sampler": None if _is_stream(dataset) else InferenceSampler(len(dataset)),
    }


@configurable(from_config=_test_loader_from_config)
def build_detection_test_loader(
    dataset: list[Any] | torchdata.Dataset,
    *,
    mapper: Callable[[dict], Any] | None,
    sampler: torchdata.Sampler | None = None,
    batch_size: int = 1,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
) -> torchdata.DataLoader:
    """Every image once, shared among the processes; also as `build_detection_test_loader(cfg, dataset_name)`.

    Args:
        dataset: a list of dataset dicts, or a dataset (map-style or iterable).
        mapper: turns a dataset dict into what the model takes; None uses the dicts as they are.
        sampler: the order; `InferenceSampler` when None.
        batch_size: images per batch of this process.
        num_workers: loading processes.
        collate_fn: turns the list of mapped dicts into a batch; the list itself when None.
    """
    dataset, sampler = _mapped_and_ordered(dataset, mapper, sampler, InferenceSampler)
    collate = collate_fn or trivial_batch_collator
    return torchdata.DataLoader(dataset, batch_size, sampler=sampler, num_workers=num_workers, collate_fn=collate)


# --- Both -----------------------------------------------------------------------------------------


def _mapped_and_ordered(
    dataset: list[Any] | torchdata.Dataset,
    mapper: Callable[[dict], Any] | None,
    sampler: torchdata.Sampler | None,
    default_sampler: Callable[[int], torchdata.Sampler],
) -> tuple[torchdata.Dataset, torchdata.Sampler | None]:
    """The dataset with `mapper` applied, and its sampler, which only an iterable dataset lacks."""
    examples = DatasetFromList(dataset, copy=False) if isinstance(dataset, list) else dataset
    if mapper is not None:
        examples = MapDataset(examples, mapper)
    _check_order(examples, sampler)
    if sampler is None and not _is_stream(examples):
        sampler = default_sampler(len(examples))
    return examples, sampler


def _is_stream(dataset: Sequence[Any] | torchdata.Dataset) -> bool:
    return isinstance(dataset, torchdata.IterableDataset)


def _check_order(dataset: torchdata.Dataset, sampler: torchdata.Sampler | None) -> None:
    assert sampler is None or not _is_stream(dataset), (
        "an iterable dataset comes in its own order: sampler must be None"
    )


def trivial_batch_collator(batch: list[Any]) -> list[Any]:
    """Returns the batch unchanged, as a list."""
    return batch


def worker_init_reset_seed(worker_id: int) -> None:
    """Seeds numpy, random and torch of a loading process from torch's seed and its number."""
    seed_all_rng(torch.initial_seed() % 2**31 + worker_id)


def _check_supported(cfg: CfgNode) -> None:
    """Raises where the config asks for data that d2lite cannot load."""
    for key in ("KEYPOINT_ON", "LOAD_PROPOSALS"):
        if cfg.MODEL[key]:
            raise NotImplementedError(f"MODEL.{key}: d2lite leaves this out; Detectron2 has it")
