"""Stands in for an installed Detectron2: d2lite under that name, with differences that d2kd has met in the real one.

PYTHONPATH=tests/detectron2_stub python -m pytest tests/d2kd

d2kd takes it for the real one (`D2KD_RUNTIME` unset), also in processes that are spawned. The differences:

- `create_ddp_model` names a GPU for every model, and DistributedDataParallel refuses that for those on the CPU;
- `.pkl` files are read by unpickling whatever they ask for, others by PyTorch, which refuses arrays of NumPy; errors of
  reading are those of pickle and zip files;
- a simple feature pyramid says how images are padded under a name that batches do not know;
- a step of the schedule at the last iteration is an error of the schedule.
"""

import pickle
import sys
from importlib.machinery import PathFinder
from typing import Any

import torch
from torch import nn

from d2lite import alias, checkpoint, engine, solver
from d2lite.engine import run_setup
from d2lite.modeling.backbone import SimpleFeaturePyramid
from d2lite.utils import comm

__version__ = "0.6"

# before what looks on disk, but behind d2kd's own finder, as for a package there
sys.meta_path.insert(sys.meta_path.index(PathFinder), alias._AliasFinder(__name__))


def _create_ddp_model(model: nn.Module, *, fp16_compression: bool = False, **kwargs: Any) -> nn.Module:
    return run_setup.create_ddp_model(
        model, fp16_compression=fp16_compression, **{"device_ids": [comm.get_local_rank()], **kwargs}
    )


def _load_file(self: Any, filename: str) -> dict[str, Any]:
    if filename.endswith(".pkl"):
        with open(filename, "rb") as file:
            content = pickle.load(file, encoding="latin1")
        return content if "model" in content and "__author__" in content else _caffe2(content)
    content = self._torch_load(filename)
    content = content if "model" in content else {"model": content}
    content["matching_heuristics"] = content.get("matching_heuristics", False) or self._use_heuristics
    return content


def _torch_load(self: Any, f: str) -> Any:
    return torch.load(f, map_location="cpu", weights_only=True)


def _caffe2(content: dict[str, Any]) -> dict[str, Any]:
    blobs = content.get("blobs", content)
    weights = {name: blob for name, blob in blobs.items() if not name.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _build_lr_scheduler(cfg: Any, optimizer: torch.optim.Optimizer) -> Any:
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and cfg.SOLVER.MAX_ITER in cfg.SOLVER.STEPS:
        raise ValueError("Milestones must be smaller than total number of updates")
    return solver.build.build_lr_scheduler(cfg, optimizer)


engine.create_ddp_model = engine.defaults.create_ddp_model = _create_ddp_model
checkpoint.DetectionCheckpointer._load_file = _load_file
checkpoint.DetectionCheckpointer._torch_load = _torch_load
SimpleFeaturePyramid.padding_constraints = property(
    lambda self: {"size_divisiblity": self._padding["size_divisibility"], "square_size": self._padding["square_size"]}
)
solver.build_lr_scheduler = _build_lr_scheduler
