"""What of a run's settings must stay when it is resumed, and what lies in its checkpoint and has no effect any more."""

import logging
import os
from collections.abc import Mapping
from typing import Any

from d2kd.config import get_key
from d2kd.errors import UserError
from d2kd.files import replacing
from detectron2.config import CfgNode

logger = logging.getLogger(__name__)

#: What the state of a run is made for.
FIXED = ("SOLVER.OPTIMIZER", "DATASETS.TRAIN", "DISTILL.INIT_FROM_TEACHER.FREEZE")
#: What the state of the loader brings along, or what was done at the start.
RESTORED = (
    "SEED",
    "MODEL.WEIGHTS",
    "DISTILL.INIT_FROM_TEACHER.ENABLED",
    "DISTILL.INIT_FROM_TEACHER.EXCLUDE",
)
#: What a resumed run may change, and should say.
FREE = (
    "SOLVER.BASE_LR",
    "SOLVER.MOMENTUM",
    "SOLVER.NESTEROV",
    "SOLVER.WEIGHT_DECAY",
    "SOLVER.WEIGHT_DECAY_NORM",
    "SOLVER.WEIGHT_DECAY_BIAS",
    "SOLVER.BIAS_LR_FACTOR",
    "SOLVER.LAYER_DECAY",
    "SOLVER.MAX_ITER",
    "SOLVER.STEPS",
    "SOLVER.GAMMA",
    "SOLVER.LR_SCHEDULER_NAME",
    "SOLVER.WARMUP_ITERS",
    "SOLVER.WARMUP_FACTOR",
    "SOLVER.WARMUP_METHOD",
    "SOLVER.BASE_LR_END",
    "SOLVER.POLY_LR_POWER",
    "DISTILL.TEACHER.WEIGHTS",
    "DISTILL.TEACHER.EVERY",
    "DATALOADER.DRAWS",
)
#: Counted by what is done, so a key of its own: the loader's position is in batches.
_IMAGES = "SOLVER.IMS_PER_BATCH x SOLVER.ACCUMULATE"
_NUM_IMAGES = "number of images in DATASETS.TRAIN"


class SettingsError(UserError):
    """A run cannot be continued under other settings."""


def run_settings(cfg: CfgNode, num_images: int | None) -> dict[str, Any]:
    """Returns the settings of a run that are compared when it is resumed, for its checkpoints.

    Args:
        cfg: of the run.
        num_images: that it trains on, where that is known.
    """
    settings = {key: _plain(get_key(cfg, key)) for key in (*FIXED, *RESTORED, *FREE)}
    return {**settings, _IMAGES: cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.ACCUMULATE, _NUM_IMAGES: num_images}


def compare_settings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Compares the settings of a run with those in its checkpoint.

    Returns:
        What has no effect any more, with the values that are in force; logged as warnings.

    Raises:
        SettingsError: what cannot change is another.
    """
    changed = {key: (saved[key], now[key]) for key in now if key in saved and saved[key] != now[key]}
    for key in (*FIXED, _IMAGES, _NUM_IMAGES):
        if key in changed and None not in changed[key]:
            before, after = changed[key]
            raise SettingsError(f"{key} was {before!r} and is {after!r}, and cannot change within a run")
    for key in FREE:
        if key in changed:
            logger.info("%s is %r from here on; it was %r.", key, changed[key][1], changed[key][0])
    in_force = {key: changed[key][0] for key in RESTORED if key in changed}
    for key, value in in_force.items():
        logger.warning("%s %r has no effect on a resumed run: %r is in force.", key, changed[key][1], value)
    return in_force


def write_config(cfg: CfgNode) -> None:
    """Writes the configuration that is in force as `OUTPUT_DIR/config.yaml`."""
    with replacing(os.path.join(cfg.OUTPUT_DIR, "config.yaml")) as temporary:
        temporary.write_text(cfg.dump(), encoding="utf-8")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
