"""Shared by all tests: the name `detectron2`, and where recorded data lies."""

from pathlib import Path

import d2kd  # noqa: F401  (makes `detectron2` importable)

# isort: split
import pytest
import torch

torch.set_num_threads(1)

DATA = Path(__file__).parent / "data"


@pytest.fixture
def data_dir() -> Path:
    """The directory of recorded data."""
    return DATA
