"""Fits a configuration made for one number of processes to another."""

from typing import List, Sequence

from d2kd.distillers.matching_schedule import preset
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer


def scale_to_processes(cfg: CfgNode, processes: int) -> CfgNode:
    """Detectron2's scaling by `SOLVER.REFERENCE_WORLD_SIZE`, and the same for what methods count in iterations.

    Those are `DISTILL.RECEPTIVE_TOKENS.WARMUP_ITERS` and the refreshes of `DISTILL.CHANNEL_MATCHING`, also those of its
    `PRESET`, whose settings are then written out in the copy.

    Returns:
        A scaled copy; the configuration itself if its reference is 0 or the same number.

    Raises:
        ValueError: the batch size cannot be divided among the reference's processes.
    """
    scaled = DefaultTrainer.auto_scale_workers(cfg, processes)
    if scaled is cfg:
        return cfg
    factor = cfg.SOLVER.REFERENCE_WORLD_SIZE / processes
    frozen = scaled.is_frozen()
    scaled.defrost()
    tokens, matching = scaled.DISTILL.RECEPTIVE_TOKENS, scaled.DISTILL.CHANNEL_MATCHING
    tokens.WARMUP_ITERS = round(tokens.WARMUP_ITERS * factor)
    matching.update(preset(matching.PRESET))
    matching.PRESET = ""
    matching.REFRESH_ITERS = _scaled(matching.REFRESH_ITERS, factor)
    matching.REFRESH_STEPS = _scaled(matching.REFRESH_STEPS, factor)
    matching.REFRESH_PERIODS = [max(1, period) for period in _scaled(matching.REFRESH_PERIODS, factor)]
    if frozen:
        scaled.freeze()
    return scaled


def _scaled(iterations: Sequence[int], factor: float) -> List[int]:
    return [round(iteration * factor) for iteration in iterations]
