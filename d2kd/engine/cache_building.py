"""Fills the cache of a teacher's features before a training: every image in every way, or the batches to come."""

import itertools
import logging
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from d2kd.data.draws import EveryWay, endless_draws, mixes_sizes
from d2kd.data.loader import ResumableLoader, build_train_loader
from d2kd.data.mapper import raise_failures
from d2kd.errors import ConfigError
from d2kd.modeling import build_distilled_model, is_distillation
from d2kd.modeling.feature_cache import FRESH, FeatureCache
from d2kd.modeling.teacher_passes import CachedDensePass
from detectron2.config import CfgNode

logger = logging.getLogger(__name__)


class Built(NamedTuple):
    """What `build_cache` has done."""

    #: Images that were there already.
    found: int
    #: Images that the teacher saw.
    computed: int


def build_cache(cfg: CfgNode, iterations: int = 0) -> Built:
    """Runs the teacher of a training on all that its students will see, and keeps the features.

    Where a batch holds images of one size, or the teacher sees each alone, that is every image in every way of the
    augmentation. Else each image has an entry for every batch it may be in: then the batches of the training are
    gone through as they will come, which SEED decides.

    Args:
        cfg: of the training, with DISTILL.CACHE.DIR.
        iterations: of the training, in the second case; 0 for all.

    Raises:
        UserError: there is no teacher, nothing that can be kept, or no room for all of it.
    """
    if not is_distillation(cfg) or not cfg.DISTILL.CACHE.DIR:
        missing = "DISTILL.TEACHER.CONFIG_FILE" if cfg.DISTILL.CACHE.DIR else "DISTILL.CACHE.DIR"
        raise ConfigError(f"d2kd cache build fills the cache of a training with a teacher: {missing} is empty.")
    loader = build_train_loader(cfg)
    problem = endless_draws(cfg, loader)
    if problem:
        raise ConfigError(f"There is no end of images to keep: {problem}.")
    dense = build_distilled_model(cfg).passes.dense
    if not isinstance(dense, CachedDensePass):
        raise ConfigError("DISTILL.METHODS compares nothing that can be kept: see the lines above.")
    dense.cache.start()
    batches, number = _batches(cfg, loader, dense.cache.reader.alone, iterations)
    device = torch.device(cfg.MODEL.DEVICE)
    cache, started = dense.cache, time.time()
    for batch in tqdm(batches, total=number, desc="batches", mininterval=1.0):
        dense([{**x, "image": x["image"].to(device)} for x in batch])
        _require_room(cache, started)
    cache.flush()
    _require_room(cache, started)
    logger.info("%d images were there, %d were computed: %s", cache.hits, cache.misses, cache.store.folder)
    return Built(cache.hits, cache.misses)


def _require_room(cache: FeatureCache, started: float) -> None:
    """
    Raises:
        ConfigError: something could not be written, or entries of this build had to make room for others of it.
    """
    problem = cache.unkept
    if not problem and cache.store.newest_removed >= started - FRESH:  # an entry's time of use is renewed so seldom
        problem = "together they are more than DISTILL.CACHE.MAX_GB"
    if not problem:
        return
    cache.flush()
    count = sum(1 for _ in cache.store.entries(cache.collection))
    raise ConfigError(
        f"DISTILL.CACHE.DIR {cache.store.folder} cannot keep the features of all images ({problem}): it holds those of "
        f"{count:,}, which trainings read. Make room, raise DISTILL.CACHE.MAX_GB, or set DISTILL.CACHE.DTYPE to "
        "float16 or int8, and build it again."
    )


def _batches(cfg: CfgNode, loader: ResumableLoader, alone: bool, iterations: int) -> tuple[Iterable[Any], int]:
    if not alone and mixes_sizes(cfg, loader):
        if cfg.SEED < 0:
            raise ConfigError(
                "SEED is negative, so the batches of the training are not known yet, and images of several sizes are "
                "padded as their batches are: set SEED, or DISTILL.CACHE.RUN to image."
            )
        number = (iterations or cfg.SOLVER.MAX_ITER) * cfg.SOLVER.ACCUMULATE
        return itertools.islice(loader, number), number
    every = EveryWay(loader)
    return _of_equal_number(every, loader), math.ceil(len(every) / loader.batch_size)


def _of_equal_number(every: EveryWay, loader: ResumableLoader) -> Iterator[list[Any]]:
    """Batches of all images; the last one is filled up with its last image, for the number is part of an entry."""
    images = DataLoader(every, batch_size=loader.batch_size, num_workers=loader.num_workers, collate_fn=list)
    for batch in images:
        batch = [x for x in raise_failures(batch) if x is not None]
        if batch:
            yield batch + [batch[-1]] * (loader.batch_size - len(batch))
