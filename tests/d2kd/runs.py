"""A tiny training run, in this process, as tools in processes of their own, and in two processes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.data.datasets import register_datasets
from d2kd.engine import DistillTrainer, load_config
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import launch
from detectron2.utils import comm

ROOT = Path(__file__).parents[2]

TINY = {
    "MODEL.RETINANET.NUM_CLASSES": 10,
    # an untrained model must have detections too
    "MODEL.RETINANET.SCORE_THRESH_TEST": -1.0,
    "TEST.DETECTIONS_PER_IMAGE": 100,
    "INPUT.MIN_SIZE_TRAIN": [64],
    "INPUT.MAX_SIZE_TRAIN": 64,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 64,
    "INPUT.RANDOM_FLIP": "horizontal",
    "DATASETS.TRAIN": ["digits_train"],
    "DATASETS.TEST": ["digits_val"],
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.BASE_LR": 0.002,
    "SOLVER.MAX_ITER": 6,
    "SOLVER.STEPS": [4],
    "SOLVER.WARMUP_ITERS": 2,
    "SOLVER.CHECKPOINT_PERIOD": 3,
}


def forget(names: set[str]) -> None:
    """Takes datasets out of the catalogs."""
    for name in names & set(DatasetCatalog.list()):
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def make_trainer(path: Path, trainer_class: type = DistillTrainer, **changes: Any) -> Any:
    """A trainer, before its weights are loaded; `changes` are keys with '__' for '.'."""
    cfg = load_config(str(path), [x for key, value in changes.items() for x in (key.replace("__", "."), value)])
    register_datasets(cfg)
    Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True, parents=True)
    torch.manual_seed(cfg.SEED)
    return trainer_class(cfg)


def run_training(
    path: Path, *, resume: bool = False, stop_at: int = 0, trainer_class: type = DistillTrainer, **changes: Any
) -> Any:
    """Trains in this process and returns the trainer.

    `stop_at` ends the run early, after its checkpoint; `changes` are keys with '__' for '.'.
    """
    trainer = make_trainer(path, trainer_class, **changes)
    trainer.resume_or_load(resume=resume)
    if stop_at:
        trainer.max_iter, full = stop_at, trainer.max_iter
        trainer._hooks = [hook for hook in trainer._hooks if type(hook).__name__ not in ("EvalHook", "ResultWriter")]
        assert full > stop_at
    trainer.train()
    return trainer


def read_checkpoint(directory: Path, name: str = "model_final") -> dict[str, Any]:
    """What a run saved under that name."""
    return torch.load(directory / f"{name}.pth", weights_only=True)


def tool(name: str, *arguments: Any, check: bool = True, **popen: Any) -> subprocess.CompletedProcess:
    """Runs a tool of this project as a process of its own; stdout and stderr come together."""
    return subprocess.run(
        command(name, *arguments),
        check=check,
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
        **popen,
    )


def command(name: str, *arguments: Any) -> list[str]:
    """The command line of a tool."""
    return [sys.executable, f"tools/{name}.py", *map(str, arguments)]


def environment() -> dict[str, str]:
    """One thread a process and no GPU, so that results do not depend on the machine."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}


def in_two_processes(main: Callable[..., Any], *arguments: Any) -> None:
    """Runs `main(*arguments)` in two processes on the CPU, also where there are GPUs."""
    no_gpu = mock.patch("torch.cuda.is_available", return_value=False)  # here; the variable is for the processes
    with no_gpu, mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
        launch(main, 2, dist_url="auto", args=tuple(map(str, arguments)))


def train_in_step(path: str, output: str, *options: Any) -> DistillTrainer:
    """What each of two processes does: trains from a random state of its own, and ends with the weights of the other.

    Raises:
        AssertionError: parameters or the state of the balance differ, or DDP looks for parameters without gradient.
    """
    cfg = load_config(path, ["OUTPUT_DIR", output, *options])
    register_datasets(cfg)
    torch.set_num_threads(1)
    torch.manual_seed(cfg.SEED + comm.get_rank())
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert not trainer.model.find_unused_parameters
    balance = trainer.distilled.balance
    weights = [p.double().sum().item() for p in trainer.distilled.parameters()]
    first, second = comm.all_gather((weights, None if balance is None else balance.state_dict()))
    assert first == second
    return trainer
