"""Fits a configuration made for one number of processes to another."""

from collections.abc import Sequence

from d2kd.config import ConfigError
from d2kd.distillers.matching_schedule import preset
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer


def scale_to_processes(cfg: CfgNode, processes: int) -> CfgNode:
    """Detectron2's scaling by `SOLVER.REFERENCE_WORLD_SIZE`, and the same for what methods count in iterations.

    Those are `DISTILL.RECEPTIVE_TOKENS.WARMUP_ITERS`, the refreshes of `DISTILL.CHANNEL_MATCHING`, also those of its
    `PRESET`, whose settings are then written out in the copy, and `SOLVER.EMA.DECAY`.

    Returns:
        A scaled copy; the configuration itself if its reference is 0 or the same number.

    Raises:
        ConfigError: the batch size cannot be divided among the reference's processes, or there is no such preset.
    """
    try:
        scaled = DefaultTrainer.auto_scale_workers(cfg, processes)
        published = preset(cfg.DISTILL.CHANNEL_MATCHING.PRESET)
    except (AssertionError, ValueError) as error:  # Detectron2 itself asserts
        raise ConfigError(str(error)) from error
    if scaled is cfg:
        return cfg
    factor = cfg.SOLVER.REFERENCE_WORLD_SIZE / processes
    frozen = scaled.is_frozen()
    scaled.defrost()
    tokens, matching = scaled.DISTILL.RECEPTIVE_TOKENS, scaled.DISTILL.CHANNEL_MATCHING
    tokens.WARMUP_ITERS = round(tokens.WARMUP_ITERS * factor)
    matching.update(published)
    matching.PRESET = ""
    matching.REFRESH_ITERS = _scaled(matching.REFRESH_ITERS, factor)
    matching.REFRESH_STEPS = _scaled(matching.REFRESH_STEPS, factor)
    matching.REFRESH_PERIODS = [max(1, period) for period in _scaled(matching.REFRESH_PERIODS, factor)]
    # as much is forgotten in an epoch as before; the warm-up goes by the part of the training so far and needs nothing
    scaled.SOLVER.EMA.DECAY **= 1 / factor
    if frozen:
        scaled.freeze()
    return scaled


def _scaled(iterations: Sequence[int], factor: float) -> list[int]:
    return [round(iteration * factor) for iteration in iterations]
