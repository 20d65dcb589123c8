"""Lengths in epochs, which become iterations before the training, as Detectron2 counts in those."""

import logging
import math

from d2kd.data.datasets import check_datasets, require_dataset
from d2kd.data.loader import epoch_length
from d2kd.errors import UserError
from detectron2.config import CfgNode
from detectron2.utils import comm

from .scaling import drop_late_steps

logger = logging.getLogger(__name__)


#: Keys in iterations, and in epochs, below a node.
_LENGTHS = (
    ("SOLVER", "MAX_ITER", "MAX_EPOCHS"),
    ("SOLVER", "WARMUP_ITERS", "WARMUP_EPOCHS"),
    ("SOLVER", "CHECKPOINT_PERIOD", "CHECKPOINT_EPOCHS"),
    ("TEST", "EVAL_PERIOD", "EVAL_EPOCHS"),
)


def uses_epochs(cfg: CfgNode) -> bool:
    """Returns whether a length is given in epochs."""
    return bool(cfg.SOLVER.STEP_EPOCHS) or any(cfg[part][key] > 0 for part, _, key in _LENGTHS)


def resolve_epochs(cfg: CfgNode) -> str:
    """Sets what is given in epochs in iterations: SOLVER.MAX_ITER, STEPS, WARMUP_ITERS, CHECKPOINT_PERIOD and
    TEST.EVAL_PERIOD. The keys in epochs are 0 then.

    The images are counted in the main process, all others must call it too. Batches are those of SOLVER.IMS_PER_BATCH,
    so that what `scale_to_processes` does with the iterations is right for epochs as well.

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
    solver, batch = cfg.SOLVER, cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.ACCUMULATE
    epoch = math.ceil(images / batch)
    words = []

    def iterations(epochs: float) -> int:
        return max(1, round(epochs * epoch))

    for part, key, key_in_epochs in _LENGTHS:
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
    return f"An epoch is {epoch} iterations, {images} images in batches of {batch}: {', '.join(words)}."


def with_iterations(cfg: CfgNode) -> CfgNode:
    """Returns a configuration with everything in iterations (`resolve_epochs`): the same one where it is so already."""
    if not uses_epochs(cfg):
        return cfg
    resolved, frozen = cfg.clone(), cfg.is_frozen()
    resolved.defrost()
    logger.info("%s", resolve_epochs(resolved))
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
