"""Scalars to Weights & Biases, where its package is installed and switched on."""

import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

import yaml

from d2kd.errors import ConfigError
from d2kd.files import replacing
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

logger = logging.getLogger(__name__)


def check_wandb(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: `WANDB.ENABLED` is set and the package is not installed.
    """
    if cfg.WANDB.ENABLED and importlib.util.find_spec("wandb") is None:
        raise ConfigError("WANDB.ENABLED is True, but wandb is not installed: pip install wandb, or set it False.")


class WandbWriter(EventWriter):
    """Logs every new scalar with its iteration. A run starts with the first one; a resumed training continues it."""

    def __init__(self, cfg: CfgNode, resumed: Callable[[], bool], window_size: int = 20) -> None:
        """
        Args:
            cfg: WANDB.PROJECT and NAME; all of it is logged as the run's configuration.
            resumed: whether this training continues one of the same output directory; asked when the run starts.
            window_size: of the medians of noisy scalars.

        Raises:
            ConfigError: wandb is not installed.
        """
        check_wandb(cfg)
        self._cfg = cfg
        self._resumed = resumed
        self._window_size = window_size
        self._last_iter = -1
        self._run: Any | None = None

    def write(self) -> None:
        """Logs what is new."""
        new: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(self._window_size).items():
            if iteration > self._last_iter:
                new.setdefault(iteration, {})[name] = value
        if not new:
            return
        if self._run is None:
            self._run = self._start()
        for iteration in sorted(new):
            self._run.log(new[iteration], step=iteration)
            self._last_iter = iteration

    def close(self) -> None:
        """Ends the run."""
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _start(self) -> Any:
        import wandb

        cfg = self._cfg
        id_file = os.path.join(cfg.OUTPUT_DIR, "wandb_run_id.txt")
        run = wandb.init(
            project=cfg.WANDB.PROJECT,
            name=cfg.WANDB.NAME or os.path.basename(os.path.normpath(cfg.OUTPUT_DIR)),
            dir=cfg.OUTPUT_DIR,
            config=yaml.safe_load(cfg.dump()),
            id=_read(id_file) if self._resumed() else None,
            resume="allow",
        )
        with replacing(id_file) as temporary:
            temporary.write_text(run.id, encoding="utf-8")
        logger.info("Logging to Weights & Biases, project %s, run %s", cfg.WANDB.PROJECT, run.id)
        return run


def _read(path: str) -> str | None:
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as f:
        return f.read().strip() or None
