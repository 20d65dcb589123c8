"""What of a run's settings must stay when it is resumed, has no effect any more, or decides what weights predict."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from d2kd.config import add_distill_config, get_key, leaves
from d2kd.errors import UserError
from d2kd.files import replacing
from detectron2.config import CfgNode, get_cfg

logger = logging.getLogger(__name__)

#: What the state of a run is made for.
FIXED = (
    "SOLVER.OPTIMIZER",
    "DATASETS.TRAIN",
    "DISTILL.INIT_FROM_TEACHER.FREEZE",
    "DISTILL.INIT_FROM_TEACHER.LR_FACTOR",
    "DISTILL.TEACHER.EVERY",  # methods count the iterations that they see
)
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
    "DATALOADER.DRAWS",
)
#: What decides the predictions of given weights: nodes of the configuration,
_PREDICTING = ("INPUT.", "MODEL.", "TEST.")
#: but for what in them is of the training alone, or tells the weights.
_NOT_PREDICTING = (
    "INPUT.COLOR_AUG_SSD",
    "INPUT.CROP.",
    "INPUT.MAX_SIZE_TRAIN",
    "INPUT.MIN_SIZE_TRAIN",
    "INPUT.RANDOM_FLIP",
    "MODEL.BACKBONE.FREEZE_AT",
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "TEST.BEST_CHECKPOINT.",
    "TEST.EARLY_STOP.",
    "TEST.EVAL_EPOCHS",
    "TEST.EVAL_PERIOD",
    "TEST.EXPECTED_RESULTS",
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


def other_predictions(cfg: CfgNode) -> str | None:
    """Returns a setting by which the same weights predict otherwise than in the run of OUTPUT_DIR; None without any.

    Raises:
        OSError, ValueError, yaml.YAMLError: the `config.yaml` of the run cannot be read.
    """
    defaults = get_cfg()
    add_distill_config(defaults)
    file = Path(cfg.OUTPUT_DIR, "config.yaml")
    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(written, dict):
        raise ValueError(f"{file} holds no configuration")
    known, before, now = (
        _predicting(content, cfg.DATASETS.TEST)
        for content in (yaml.safe_load(defaults.dump()), written, yaml.safe_load(cfg.dump()))
    )
    before = {**known, **before}  # what a version without a key did
    changed = next((key for key, value in now.items() if key in before and value != before[key]), None)
    return None if changed is None else f"{changed} is {now[changed]!r}, and was {before[changed]!r}"


def _predicting(content: Mapping[str, Any], datasets: Sequence[str]) -> dict[str, Any]:
    """Of a configuration every key that decides predictions on some datasets, with its value."""
    found = dict(leaves(CfgNode(content)))
    deciding = {k: v for k, v in found.items() if k.startswith(_PREDICTING) and not k.startswith(_NOT_PREDICTING)}
    register = found.get("DATASETS.REGISTER") or ()
    return {**deciding, "DATASETS.REGISTER": [entry for entry in register if entry.get("NAME") in datasets]}


def write_config(cfg: CfgNode) -> None:
    """Writes the configuration that is in force as `OUTPUT_DIR/config.yaml`."""
    with replacing(os.path.join(cfg.OUTPUT_DIR, "config.yaml")) as temporary:
        temporary.write_text(cfg.dump(), encoding="utf-8")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
