"""Lengths in epochs, which become iterations before the training, as Detectron2 counts in those."""

import logging
import math

from d2kd.data.datasets import check_datasets, require_dataset
from d2kd.data.loader import epoch_length
from d2kd.errors import UserError
from detectron2.config import CfgNode
from detectron2.utils import comm

from .scaling import LENGTHS, drop_late_steps, images_per_iteration, needs_scaling, scale_to_batch

logger = logging.getLogger(__name__)


def uses_epochs(cfg: CfgNode) -> bool:
    """Returns whether a length is given in epochs."""
    return bool(cfg.SOLVER.STEP_EPOCHS) or any(cfg[part][key] > 0 for part, _, key in LENGTHS)


def resolve_epochs(cfg: CfgNode) -> str:
    """Sets what is given in epochs in iterations: SOLVER.MAX_ITER, STEPS, WARMUP_ITERS, CHECKPOINT_PERIOD and
    TEST.EVAL_PERIOD. The keys in epochs are 0 then.

    The images are counted in the main process, all others must call it too. Batches are those of SOLVER.IMS_PER_BATCH,
    so that what `scale_to_processes` does with the iterations is right for epochs as well. Where MAX_EPOCHS is so short
    that all of STEPS come too late, which did not before, they keep their places in the training.

    Args:
        cfg: not frozen; datasets of `DATASETS.REGISTER` must be registered.

    Returns:
        What was set, for the log; "" where nothing is given in epochs.

    Raises:
        DatasetError: there is nothing to train on.
    """
    if not uses_epochs(cfg):
        return ""
    images = comm.all_gather(_count_images(cfg) if comm.is_main_process() else 0)[0]
    solver, batch = cfg.SOLVER, images_per_iteration(cfg)
    epoch, before = math.ceil(images / batch), cfg.SOLVER.MAX_ITER
    words = []

    def iterations(epochs: float) -> int:
        return max(1, round(epochs * epoch))

    for part, key, key_in_epochs in LENGTHS:
        node = cfg[part]
        if node[key_in_epochs] > 0:
            node[key] = iterations(node[key_in_epochs])
            words.append(f"{part}.{key} {node[key]} ({node[key_in_epochs]:g} epochs)")
            node[key_in_epochs] = 0.0
    if solver.STEP_EPOCHS:
        solver.STEPS = tuple(sorted({iterations(step) for step in solver.STEP_EPOCHS}))
        words.append(
            f"SOLVER.STEPS {list(solver.STEPS)} (epochs {', '.join(f'{step:g}' for step in solver.STEP_EPOCHS)})"
        )
        solver.STEP_EPOCHS = []
    elif solver.STEPS and solver.MAX_ITER <= min(solver.STEPS) and max(solver.STEPS) < before:
        # of a longer schedule in iterations, of which none would have an effect
        steps = tuple(sorted({max(1, round(step * solver.MAX_ITER / before)) for step in solver.STEPS}))
        words.append(f"SOLVER.STEPS {list(steps)} (as far as {list(solver.STEPS)} of {before})")
        solver.STEPS = steps
    return f"An epoch is {epoch} iterations, {images} images in batches of {batch}: {', '.join(words)}."


def with_iterations(cfg: CfgNode) -> CfgNode:
    """Returns a configuration with everything in iterations, of as many images as they have (`scale_to_batch`,
    `resolve_epochs`): the same one where it is so already.
    """
    if not (uses_epochs(cfg) or needs_scaling(cfg)):
        return cfg
    resolved, frozen = cfg.clone(), cfg.is_frozen()
    resolved.defrost()
    for line in (scale_to_batch(resolved), resolve_epochs(resolved)):
        if line:
            logger.info("%s", line)
    drop_late_steps(resolved.SOLVER)
    if frozen:
        resolved.freeze()
    return resolved


def _count_images(cfg: CfgNode) -> int:
    for name in cfg.DATASETS.TRAIN:
        require_dataset(cfg, name, "TRAIN")
    try:
        return epoch_length(cfg)
    except UserError:
        raise
    except Exception:
        check_datasets(cfg, ("TRAIN",))  # which says what is wrong
        raise
