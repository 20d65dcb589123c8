"""Fits a configuration made for one number of processes to another."""

from d2kd.distillers import DISTILLERS
from d2kd.errors import ConfigError
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer


def drop_late_steps(solver: CfgNode) -> tuple[int, ...]:
    """Leaves out steps of the learning rate that have no effect: those that are not below MAX_ITER.

    Detectron2 ignores steps behind MAX_ITER, and fails at one that is equal.

    Args:
        solver: the node SOLVER, not frozen; schedules without steps are left alone.

    Returns:
        The steps that were left out.
    """
    if solver.LR_SCHEDULER_NAME != "WarmupMultiStepLR":
        return ()
    late = tuple(step for step in solver.STEPS if step >= solver.MAX_ITER)
    solver.STEPS = tuple(step for step in solver.STEPS if step < solver.MAX_ITER)
    return late


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
    for node, before, key in (
        (scaled.SOLVER, cfg.SOLVER, "MAX_ITER"),
        (scaled.SOLVER, cfg.SOLVER, "CHECKPOINT_PERIOD"),
        (scaled.TEST, cfg.TEST, "EVAL_PERIOD"),
    ):
        node[key] = max(node[key], min(before[key], 1))  # rounded to 0, it would be never
    drop_late_steps(scaled.SOLVER)  # rounding may have made some
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
