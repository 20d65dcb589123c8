"""Shared by all tests: the name `detectron2`, and where recorded data lies."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import d2kd  # noqa: F401  (makes `detectron2` importable)

torch.set_num_threads(1)

#: d2lite's own tests are about d2lite, whatever the runtime.
collect_ignore = ["d2lite"] if os.environ.get("D2KD_RUNTIME", "").lower() == "detectron2" else []

DATA = Path(__file__).parent / "data"

#: Tests of a GPU run on tensors that pretend to be on one: benchmarks/pretend_cuda.py.
PRETEND = os.environ.get("D2KD_PRETEND_CUDA") == "1" and not torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what is marked `cuda` where there is no GPU."""
    if not torch.cuda.is_available() and not PRETEND:
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def pretended_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """A GPU that is not there, for the tests that are about one."""
    if not PRETEND or not request.node.get_closest_marker("cuda"):
        yield
        return
    sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
    from pretend_cuda import PretendCuda

    with PretendCuda():
        yield


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
