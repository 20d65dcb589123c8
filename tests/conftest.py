"""Shared by all tests: the name `detectron2`, and where recorded data lies."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import d2kd  # noqa: F401  (makes `detectron2` importable)

torch.set_num_threads(1)

#: d2lite's own tests are about d2lite, whatever the runtime.
collect_ignore = ["d2lite"] if os.environ.get("D2KD_RUNTIME", "").lower() == "detectron2" else []

DATA = Path(__file__).parent / "data"


@pytest.fixture
def data_dir() -> Path:
    """The directory of recorded data."""
    return DATA


@pytest.fixture(autouse=True)
def restore_loggers() -> Iterator[None]:
    """Undoes what `setup_logger` does to loggers: later tests read the log too."""
    loggers = [logging.getLogger(name) for name in ("d2lite", "detectron2", "fvcore", "d2kd")]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (level, propagate, handlers) in zip(loggers, before):
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.setLevel(level)
        logger.propagate, logger.handlers[:] = propagate, handlers
