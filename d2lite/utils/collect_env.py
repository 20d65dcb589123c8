"""A report about the software and hardware in use, for logs and bug reports."""

import importlib
import importlib.metadata
import os
import platform
import sys

import numpy as np
import torch
from tabulate import tabulate

import d2lite

__all__ = ["collect_env_info"]

_LIBRARIES = ("torchvision", "fvcore", "iopath", "pycocotools", "cv2", "PIL")


def collect_env_info() -> str:
    """Returns a table of the runtime, the versions of the libraries it is built on, and the devices."""
    rows: list[tuple[str, str]] = [
        ("runtime", f"d2lite {d2lite.__version__} @{os.path.dirname(d2lite.__file__)}"),
        ("Platform", platform.platform()),
        ("Python", sys.version.replace("\n", "")),
        ("NumPy", np.__version__),
        ("PyTorch", f"{torch.__version__} @{os.path.dirname(torch.__file__)}"),
        ("PyTorch debug build", str(torch.version.debug)),
        *((name, _version(name)) for name in _LIBRARIES),
        ("CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in PyTorch"),
        *_gpu_rows(),
        ("DETECTRON2_DATASETS", os.environ.get("DETECTRON2_DATASETS", "<not set>")),
    ]
    return tabulate(rows)


def _version(library: str) -> str:
    try:
        module = importlib.import_module(library)
    except ImportError as e:
        return f"not available ({e})"
    return getattr(module, "__version__", None) or _distribution_version(library)


def _distribution_version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def _gpu_rows() -> list[tuple[str, str]]:
    rows = [("GPU available", str(torch.cuda.is_available()))]
    if not torch.cuda.is_available():
        return rows
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        rows.append(
            (
                f"GPU {index}",
                f"{device.name}, {device.total_memory / 2**30:.1f} GiB, sm_{device.major}{device.minor}",
            )
        )
    rows.append(("CUDA of PyTorch", str(torch.version.cuda)))
    rows.append(("cuDNN", str(torch.backends.cudnn.version())))
    return rows
