"""A training loader whose every batch is a function of (seed, process, number of the batch).

Detectron2's loader starts its stream anew when a run is resumed, and its augmentations depend on the number of workers.
Here a resumed run sees the images, and the augmentations, that it would have seen; with any number of workers.
"""

import contextlib
import copy
import itertools
import logging
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import parent_process
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from d2kd.errors import ConfigError
from d2kd.interrupts import held_back_in_new_processes
from d2kd.modeling.architectures import architecture_class
from d2kd.rng import derive_seed
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data.common import DatasetFromList
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm

from .classification import RepeatAugmentation, build_mix, repeated_length, require_pairs
from .coco import DatasetError
from .mapper import LoadingFailure, build_mapper, handing_over_failures, raise_failures, wrap_mapper

logger = logging.getLogger(__name__)

#: A stream position and the index of the image there.
Draw = tuple[int, int]
#: A number, counted from the first one of the run, and its draws.
Batch = tuple[int, list[Draw]]
#: Turns a record into a model input; None says that another image must take its place.
Mapper = Callable[[dict[str, Any]], dict[str, Any] | None]
#: Changes the model inputs of one batch together, as mixup does.
Mix = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
#: Called with the number of a batch, counted from the first one of the run, and its model inputs, where these are read:
#: it may put more into them, such as what a disk has of them.
Prefetch = Callable[[int, list[dict[str, Any]]], None]
#: After so many unreadable images in a row the dataset, not an image, is broken.
MAX_REPLACEMENTS = 50
#: Tells the seed of a batch from those of draws.
_OF_BATCH = 1
#: Tells the seed of a way to augment an image from those of draws.
_OF_IMAGE = 2
#: Of DATALOADER.SAMPLER_TRAIN, repeated augmentation.
_REPEATED = "RepeatAugSampler"


class ResumableLoader:
    """Endless batches for this process. `seed` and `start` may be set until the first iteration begins."""

    def __init__(
        self,
        dicts: list[dict[str, Any]],
        mapper: Mapper,
        build_sampler: Callable[[int], Sampler[int]],
        *,
        batch_size: int,
        num_workers: int = 0,
        aspect_ratio_grouping: bool = True,
        seed: int = 0,
        pin_memory: bool = False,
        mix: Mix | None = None,
        draws: int = 0,
    ) -> None:
        """
        Args:
            dicts: the dataset in Detectron2's format.
            mapper: see `Mapper`.
            build_sampler: makes the endless sampler of this process, given the seed.
            batch_size: images a batch, on this process.
            num_workers: processes that read images; 0 reads in this one.
            aspect_ratio_grouping: put only wide, or only tall, images into a batch, where records tell their sizes.
            seed: decides order and augmentations.
            pin_memory: hand out images in page-locked memory, from where a GPU fetches them while it computes.
            mix: see `Mix`; called where images are read, with random numbers that depend on seed, process and number of
                the batch.
            draws: ways in which each image is augmented, whatever the seed; 0 augments it anew every time.

        Attributes:
            prefetch: see `Prefetch`; may be set until the first iteration begins.
        """
        # serialized once: as Python objects the records of COCO take gigabytes, and every worker would touch them
        self.records = DatasetFromList(dicts, copy=False, serialize=True)
        self.mapper = mapper
        self.build_sampler = build_sampler
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.wide = _wide(dicts) if aspect_ratio_grouping else None
        self.seed = seed
        self.pin_memory = pin_memory
        self.mix = mix
        self.draws = draws
        self.prefetch: Prefetch | None = None
        self.start = 0

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Batches from number `start` on."""
        batches = _Batches(self.build_sampler(self.seed), self.batch_size, self.wide, self.start)
        mapper = handing_over_failures(self.mapper) if self.num_workers else self.mapper
        seed = (self.seed, comm.get_rank())
        dataset = _SeededDataset(self.records, mapper, seed, self.mix, self.draws, self.prefetch)
        loader = DataLoader(
            dataset,
            batch_sampler=cast(Any, batches),  # what a batch is, is between it and the dataset
            num_workers=self.num_workers,
            collate_fn=list,
            pin_memory=self.pin_memory,
            worker_init_fn=_init_worker,
            # without it, starting the workers draws from the global random state, which belongs to the model
            generator=torch.Generator().manual_seed(self.seed),
        )
        # one that Ctrl-C ends before it has read what it is to do would be waited for without an end
        with held_back_in_new_processes():
            batches_of_workers = iter(loader)
        return map(raise_failures, batches_of_workers)


def _wide(dicts: list[dict[str, Any]]) -> list[bool] | None:
    """Whether each image is wider than tall; None where that is not listed, as in folders of label maps."""
    if all("width" in d and "height" in d for d in dicts):
        return [d["width"] > d["height"] for d in dicts]
    logger.info("The dataset does not list the sizes of its images: batches are not grouped by aspect ratio.")
    return None


class _Batches(Sampler[Batch]):
    """Batches of draws, grouped by aspect ratio before any image is read: skipping to a position costs nothing."""

    def __init__(self, sampler: Sampler[int], batch_size: int, wide: Sequence[bool] | None, start: int) -> None:
        self.sampler, self.batch_size, self.wide, self.start = sampler, batch_size, wide, start

    def __iter__(self) -> Iterator[Batch]:
        return itertools.islice(enumerate(self._batches()), self.start, None)

    def _batches(self) -> Iterator[list[Draw]]:
        buckets: tuple[list[Draw], list[Draw]] = ([], [])
        for position, index in enumerate(self.sampler):
            bucket = buckets[self.wide[index] if self.wide is not None else 0]
            bucket.append((position, index))
            if len(bucket) == self.batch_size:
                yield bucket[:]
                bucket.clear()


class _SeededDataset(Dataset[dict[str, Any]]):
    """Maps draws to model inputs, with random numbers that depend on the draw alone, and mixes those of a batch."""

    def __init__(
        self,
        records: DatasetFromList,
        mapper: Mapper,
        seed: tuple[int, int],
        mix: Mix | None,
        draws: int = 0,
        prefetch: Prefetch | None = None,
    ) -> None:
        self.records = records
        self.mapper = mapper
        self.seed = seed
        self.mix = mix
        self.draws = draws
        self.prefetch = prefetch

    def __len__(self) -> int:
        return len(self.records)

    def __getitems__(self, batch: Batch) -> list[Any]:
        """What the `DataLoader` calls with an item of its batch sampler."""
        number, draws = batch
        with _restoring_random_states():
            inputs = [self._load(draw) for draw in draws]
            if any(isinstance(x, LoadingFailure) for x in inputs):
                return inputs
            if self.mix is not None:
                _seed(derive_seed(*self.seed, number, _OF_BATCH))
                inputs = self.mix(inputs)
            if self.prefetch is not None:
                self.prefetch(number, inputs)
            return inputs

    def __getitem__(self, draw: Draw) -> Any:
        with _restoring_random_states():
            return self._load(draw)

    def _load(self, draw: Draw) -> Any:
        position, index = draw
        seed = derive_seed(*self.seed, position)
        if self.draws:
            seed_way(index, seed % self.draws)
        else:
            _seed(seed)
        for _ in range(MAX_REPLACEMENTS):
            data = self.mapper(self.records[index])
            if data is not None:
                return data
            index = int(np.random.randint(len(self.records)))
        return LoadingFailure(
            f"{MAX_REPLACEMENTS} images in a row cannot be read (DATASETS.ON_BAD_IMAGE is 'skip'). The files are named "
            "in the log above: check DATASETS.REGISTER or DETECTRON2_DATASETS."
        )


@contextlib.contextmanager
def _restoring_random_states() -> Iterator[None]:
    """Puts all three random states back: in this process they belong to the model."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def seed_way(index: int, way: int) -> None:
    """Sets all three random states to those of a way to augment an image (DATALOADER.DRAWS), whatever the run's seed.

    Args:
        index: of the image in the dataset.
        way: from 0 on.
    """
    _seed(derive_seed(index, way, _OF_IMAGE))


def _init_worker(worker: int) -> None:
    import cv2

    cv2.setNumThreads(0)  # the workers are the parallelism
    # a terminal sends Ctrl-C to all processes, a scheduler SIGTERM; the main one needs its images until it has saved
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        parent = parent_process()
        assert parent is not None  # this is a worker
        threading.Thread(target=_end_when_the_parent_says, args=(parent.pid,), daemon=True).start()


def _end_when_the_parent_says(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)


def build_train_loader(cfg: CfgNode, mapper: Mapper | None = None) -> ResumableLoader:
    """The training loader that a Detectron2 configuration describes, made resumable.

    Raises:
        DatasetError: nothing is left to train on.
        ConfigError: `DATALOADER.SAMPLER_TRAIN` or the batch size is not possible.
    """
    dicts, classifies = training_records(cfg), architecture_class(cfg).CLASSIFIES_IMAGES
    return ResumableLoader(
        dicts,
        wrap_mapper(mapper or build_mapper(cfg, is_train=True), cfg.DATASETS.ON_BAD_IMAGE),
        _sampler_builder(cfg, dicts),
        batch_size=_batch_size(cfg),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        # of classifiers all images have one size
        aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING and not classifies,
        seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
        pin_memory=cfg.MODEL.DEVICE.startswith("cuda"),
        mix=build_mix(cfg) if classifies else None,
        draws=cfg.DATALOADER.DRAWS,
    )


def training_records(cfg: CfgNode) -> list[dict[str, Any]]:
    """Returns the records of DATASETS.TRAIN that are trained on.

    Raises:
        DatasetError: nothing is left to train on.
    """
    if not cfg.DATASETS.TRAIN:
        raise DatasetError("DATASETS.TRAIN is empty: name a registered dataset, or give a --config-file that does.")
    try:
        dicts = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    except AssertionError as error:
        raise DatasetError(
            f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} cannot be trained on: {error}. Check the annotation files, or "
            "set DATALOADER.FILTER_EMPTY_ANNOTATIONS False to train on empty images too."
        ) from error
    return cast(list[dict[str, Any]], dicts)


def epoch_length(cfg: CfgNode) -> int:
    """Returns how many images an epoch of the training has: those that are trained on.

    Raises:
        DatasetError: there are none.
    """
    size = len(training_records(cfg))
    repeated = cfg.DATALOADER.SAMPLER_TRAIN == _REPEATED
    return repeated_length(size, cfg.DATALOADER.REPEATS) if repeated else size


class TestLoader:
    """Every image of a test set once, shared among the processes, in batches of TEST.IMS_PER_BATCH."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        """
        Args:
            loader: of what its mapper gives, or of failures.
        """
        self.loader = loader

    @property
    def dataset(self) -> Any:
        """What the images come from."""
        return self.loader.dataset

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        with held_back_in_new_processes():
            batches = iter(self.loader)
        return map(raise_failures, batches)


def build_test_loader(cfg: CfgNode, dataset_name: str, mapper: Mapper | None = None) -> TestLoader:
    """The loader of a test set; an image that cannot be used is an error that names it (`wrap_mapper`)."""
    dicts = get_detection_dataset_dicts(
        [dataset_name],
        filter_empty=False,
        proposal_files=(
            [cfg.DATASETS.PROPOSAL_FILES_TEST[list(cfg.DATASETS.TEST).index(dataset_name)]]
            if cfg.MODEL.LOAD_PROPOSALS
            else None
        ),
    )
    guarded = wrap_mapper(mapper or build_mapper(cfg, is_train=False), "error", evaluates=True)
    loader = build_detection_test_loader(
        dataset=dicts,
        mapper=handing_over_failures(guarded),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        batch_size=cfg.TEST.IMS_PER_BATCH,
    )
    return TestLoader(loader)


def _batch_size(cfg: CfgNode) -> int:
    total, world = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
    if total <= 0 or total % world:
        raise ConfigError(f"SOLVER.IMS_PER_BATCH is {total}; it must be a positive multiple of the {world} processes.")
    if architecture_class(cfg).CLASSIFIES_IMAGES:
        require_pairs(cfg, total // world, f", {total // world} on each of {world} processes")
    return total // world


def _sampler_builder(cfg: CfgNode, dicts: list[dict[str, Any]]) -> Callable[[int], Sampler[int]]:
    """Makes the sampler that the configuration names, given a seed; keeps no record."""
    name, size = cfg.DATALOADER.SAMPLER_TRAIN, len(dicts)
    if name == "TrainingSampler":
        return lambda seed: TrainingSampler(size, seed=seed)
    if name == "RepeatFactorTrainingSampler":
        if "annotations" not in dicts[0] and "label" in dicts[0]:
            dicts = [{"annotations": [{"category_id": record["label"]}]} for record in dicts]
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dicts, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
        return lambda seed: RepeatFactorTrainingSampler(factors, seed=seed)
    if name == _REPEATED:
        repeats = cfg.DATALOADER.REPEATS
        return lambda seed: RepeatAugmentation(size, repeats, seed)
    raise ConfigError(
        f"DATALOADER.SAMPLER_TRAIN is {name!r}; it must be TrainingSampler, RepeatFactorTrainingSampler or {_REPEATED}."
    )


def side_stream(loader: Any, number: int) -> Any:
    """Returns a loader of the same images in an order of its own: a training that reads the other misses none.

    Args:
        loader: of a training; one without a `seed`, which has a single stream, is returned itself.
        number: of the stream; each has its own order and augmentation.
    """
    if not hasattr(loader, "seed"):
        return loader
    stream = copy.copy(loader)
    stream.seed, stream.start, stream.prefetch = derive_seed(loader.seed, number), 0, None
    return stream
