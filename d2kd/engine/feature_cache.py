"""Connects the cache of a teacher's features with the training that reads it, and says at the start what it keeps."""

import logging
from typing import Any

from d2kd.data.draws import endless_draws, mixes_sizes, ways_to_augment
from d2kd.distillers import Distiller
from d2kd.modeling import DistilledModel
from d2kd.modeling.feature_cache import GB, Prefetch
from d2kd.modeling.teacher_passes import CachedDensePass
from detectron2.config import CfgNode
from detectron2.utils import comm

logger = logging.getLogger(__name__)


def connect_cache(cfg: CfgNode, distilled: DistilledModel, loader: Any) -> None:
    """Has the loader's processes read the entries of each batch (`DISTILL.CACHE`).

    Where the augmentation has no end of results, hardly one of which comes twice, the teacher runs instead.

    Args:
        cfg: of the training.
        distilled: its model.
        loader: of the training; one that is not of d2kd has the entries read between its batches and the steps.

    Raises:
        ConfigError: the cache cannot be written.
    """
    dense = distilled.passes.dense
    if not isinstance(dense, CachedDensePass):
        return
    problem = endless_draws(cfg, loader)
    if problem:
        logger.warning("DISTILL.CACHE.DIR has no effect, the teacher runs: %s.", problem)
        distilled.passes.dense = dense.uncached()
        return
    dense.cache.start()
    if hasattr(loader, "prefetch"):
        loader.prefetch = Prefetch(dense.cache.reader, cfg.SOLVER.ACCUMULATE, distilled.every)
    looking = [
        name
        for name, distiller in distilled.distillers.items()
        if isinstance(distiller, Distiller) and distiller.calibration_request() is not None
    ]
    if looking:
        logger.warning(
            "DISTILL.CACHE does not keep what %s looks at between steps: the teacher runs there.",
            " and ".join(looking),
        )
    if comm.is_main_process():
        logger.info("%s", describe(cfg, dense, loader))


def describe(cfg: CfgNode, dense: CachedDensePass, loader: Any) -> str:
    """Returns what a cache keeps, and how much of it is there, in a sentence."""
    cache = dense.cache
    sizes = [entry.size for entry in cache.store.entries(cache.collection)]
    ways = getattr(loader, "draws", 0) or len(ways_to_augment(getattr(loader, "mapper", None)) or ())
    records = getattr(loader, "records", None)
    many = "" if records is None or not ways else f"{len(records):,} images in {ways} ways each; "
    paddings = ""
    if not cache.reader.alone and mixes_sizes(cfg, loader):
        paddings = (
            " Batches mix images of several sizes, so each is padded to several sizes, with an entry for each: with "
            "DISTILL.CACHE.RUN image there is one for each image and way."
        )
    return (
        f"Cache of the teacher's features in {cache.store.folder}/{cache.collection} ({cache.dtype}; "
        f"{', '.join(dense.taps)}): {many}{len(sizes):,} entries of {sum(sizes) / GB:.2f} GB are there.{paddings}"
    )


def tell_of_cache(distilled: DistilledModel) -> None:
    """Logs what a training has read and computed, of this process."""
    dense = distilled.passes.dense
    if isinstance(dense, CachedDensePass):
        hits, misses = f"{dense.cache.hits:,}", f"{dense.cache.misses:,}"
        logger.info("Cache of the teacher's features: those of %s images were read, of %s computed.", hits, misses)
