"""Fits a configuration made for one number of processes to another."""

from d2kd.distillers import DISTILLERS
from d2kd.errors import ConfigError
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer


def scale_to_processes(cfg: CfgNode, processes: int) -> CfgNode:
    """Applies Detectron2's scaling by `SOLVER.REFERENCE_WORLD_SIZE`, and the same to what methods count in iterations.

    Those are the settings that a method declares with `iterations=True`, and `SOLVER.EMA.DECAY`.

    Returns:
        A scaled copy; the configuration itself if its reference is 0 or the same number.

    Raises:
        ConfigError: the batch size cannot be divided among the reference's processes.
    """
    reference, images = cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH
    if reference not in (0, processes) and images % reference:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {images} cannot be divided among the {reference} processes of "
            "SOLVER.REFERENCE_WORLD_SIZE, and so not be scaled to another number of them."
        )
    scaled = DefaultTrainer.auto_scale_workers(cfg, processes)
    if scaled is cfg:
        return cfg
    factor = cfg.SOLVER.REFERENCE_WORLD_SIZE / processes
    frozen = scaled.is_frozen()
    scaled.defrost()
    # rounding may have made steps of the last iteration, which Detectron2's schedule does not take
    scaled.SOLVER.STEPS = tuple(step for step in scaled.SOLVER.STEPS if step < scaled.SOLVER.MAX_ITER)
    for _, method in DISTILLERS:
        node = scaled.DISTILL.get(method.NODE, {})
        for declared in method.SETTINGS.values():
            if declared.iterations and declared.key in node:
                node[declared.key] = declared.scaled(node[declared.key], factor)
    # as much is forgotten in an epoch as before; the warm-up goes by the part of the training so far and needs nothing
    scaled.SOLVER.EMA.DECAY **= 1 / factor
    if frozen:
        scaled.freeze()
    return scaled
