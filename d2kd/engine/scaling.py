"""Fits a configuration made for one batch size, or number of processes, to another."""

from d2kd.config import EPOCHS, list_declared
from d2kd.distillers import DISTILLERS, scale_schedules
from d2kd.errors import ConfigError
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

#: Keys in iterations, and in epochs, below a node; but for those of the steps.
LENGTHS = tuple(
    (*key.split("."), in_epochs.split(".")[1]) for key, in_epochs in EPOCHS.items() if key != "SOLVER.STEPS"
)


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


def images_per_iteration(cfg: CfgNode) -> int:
    """Returns how many images an iteration has, over all processes and accumulated batches."""
    return int(cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.ACCUMULATE)


def needs_scaling(cfg: CfgNode) -> bool:
    """Returns whether `scale_to_batch` would change anything."""
    return cfg.SOLVER.REFERENCE_BATCH not in (0, images_per_iteration(cfg))


def scale_to_batch(cfg: CfgNode) -> str:
    """Applies the linear rule: with k times the images of `SOLVER.REFERENCE_BATCH` in an iteration, the learning rate
    is k times as large, and as many images are seen in 1 / k of the iterations (arXiv 1706.02677, section 2.1).

    So are warm-up, steps, periods, what methods count in iterations, and the memory of `SOLVER.EMA`. What is given in
    epochs needs nothing: `resolve_epochs`, after this. `SOLVER.REFERENCE_BATCH` is the batch as it is then, so that
    nothing is scaled twice.

    Args:
        cfg: not frozen.

    Returns:
        What was set, for the log; "" where there is nothing to scale.
    """
    if not needs_scaling(cfg):
        return ""
    solver, images = cfg.SOLVER, images_per_iteration(cfg)
    reference, factor = solver.REFERENCE_BATCH, solver.REFERENCE_BATCH / images
    words = []
    for key in ("BASE_LR", "BASE_LR_END"):
        before, solver[key] = solver[key], solver[key] / factor
        words += [f"{key} {solver[key]:.6g}, not {before:.6g}"] if before else []
    for part, key, key_in_epochs in LENGTHS:
        before = cfg[part][key]
        cfg[part][key] = max(round(before * factor), min(before, 1))  # rounded to 0, it would be never
        words += [f"{key} {cfg[part][key]}, not {before}"] if before > 0 and not cfg[part][key_in_epochs] else []
    if not solver.STEP_EPOCHS and solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        before = tuple(solver.STEPS)
        solver.STEPS = tuple(sorted({max(1, round(step * factor)) for step in before}))
        words += [f"STEPS {list(solver.STEPS)}, not {list(before)}"] if before else []
    _scale_methods(cfg, factor)
    solver.REFERENCE_BATCH = images
    return (
        f"SOLVER.REFERENCE_BATCH is {reference}, and an iteration has {images} images: by the linear rule "
        f"{'; '.join(words)}."
    )


def _scale_methods(cfg: CfgNode, factor: float) -> None:
    """Scales what methods count in iterations, and what an average forgets, to `factor` times the iterations."""
    for _, method in DISTILLERS:
        node = cfg.DISTILL.get(method.NODE, {})
        for declared in method.SETTINGS.values():
            if declared.iterations and declared.key in node:
                node[declared.key] = declared.scaled(node[declared.key], factor)
    patience = list_declared()["DISTILL.GUARD.PATIENCE"]
    cfg.DISTILL.GUARD.PATIENCE = patience.scaled(cfg.DISTILL.GUARD.PATIENCE, factor)
    scale_schedules(cfg, [method.NODE for _, method in DISTILLERS if method.NODE in cfg.DISTILL], factor)
    # as much is forgotten in an epoch as before; the warm-up goes by the part of the training so far and needs nothing
    cfg.SOLVER.EMA.DECAY **= 1 / factor


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
    scaled.SOLVER.BASE_LR_END /= factor  # as BASE_LR was, or the rate would rise to it
    for node, before, key in (
        (scaled.SOLVER, cfg.SOLVER, "MAX_ITER"),
        (scaled.SOLVER, cfg.SOLVER, "CHECKPOINT_PERIOD"),
        (scaled.TEST, cfg.TEST, "EVAL_PERIOD"),
    ):
        node[key] = max(node[key], min(before[key], 1))  # rounded to 0, it would be never
    drop_late_steps(scaled.SOLVER)  # rounding may have made some
    _scale_methods(scaled, factor)
    # what SOLVER.REFERENCE_BATCH says is of the batch before, and only its ratio to this one counts
    scaled.SOLVER.REFERENCE_BATCH = round(cfg.SOLVER.REFERENCE_BATCH / factor)
    if frozen:
        scaled.freeze()
    return scaled
