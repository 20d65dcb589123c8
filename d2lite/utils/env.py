"""Environment of the process: random seeds, library settings, versions."""

import logging
import os
import random

import numpy as np
import torch

__all__ = ["TORCH_VERSION", "seed_all_rng", "setup_environment"]

TORCH_VERSION = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
"""(major, minor)"""

logger = logging.getLogger(__name__)


def seed_all_rng(seed: int | None = None) -> None:
    """Seeds the generators of Python, NumPy and PyTorch.

    Args:
        seed: in [0, 2**32); None takes one from the operating system, and logs it.
    """
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
        logger.info("Using a generated random seed %d", seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    os.environ["PYTHONHASHSEED"] = str(seed)


def setup_environment() -> None:
    """Applies settings of other libraries that must be made before they are first used."""
    # OpenCV would otherwise search for OpenCL devices, and occupy GPU memory in every worker process.
    os.environ.setdefault("OPENCV_OPENCL_RUNTIME", "disabled")
