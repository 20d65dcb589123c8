"""A small PhotoDigits, a teacher for it, and a way to run the tools."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
import torch
from models import config, model

import d2kd  # noqa: F401  (makes `detectron2` importable, also in processes that are spawned)

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


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PhotoDigits with a few images of 64 x 64 pixels."""
    target = tmp_path_factory.mktemp("data") / "digits"
    command = [sys.executable, "datasets/prepare_photo_digits.py", "--output", str(target), "--image-size", "64"]
    subprocess.run([*command, "--num-train", "24", "--num-val", "4"], check=True, cwd=ROOT, capture_output=True)
    return target


@pytest.fixture
def write_config(digits: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes the YAML of a tiny RetinaNet on that dataset; keyword arguments are keys with '__' for '.'."""

    def write(name: str = "student", **changes: Any) -> Path:
        register = [
            {"NAME": f"digits_{s}", "JSON": str(digits / f"annotations/instances_{s}.json"), "IMAGES": str(digits / s)}
            for s in ("train", "val")
        ]
        keys = {k.replace(".", "__"): v for k, v in TINY.items()}
        cfg = config(**{**keys, "DATASETS__REGISTER": register, "OUTPUT_DIR": str(tmp_path / name), **changes})
        path = tmp_path / f"{name}.yaml"
        path.write_text(cfg.dump())
        return path

    return write


@pytest.fixture
def teacher(write_config: Callable[..., Path], tmp_path: Path) -> Dict[str, Any]:
    """A wider, untrained teacher; the keys that name it."""
    path = write_config("teacher", MODEL__RESNETS__RES2_OUT_CHANNELS=32)
    cfg = config(MODEL__RESNETS__RES2_OUT_CHANNELS=32, MODEL__RETINANET__NUM_CLASSES=10)
    weights = tmp_path / "teacher.pth"
    torch.save({"model": model(cfg, seed=7).state_dict()}, weights)
    return {
        "DISTILL__TEACHER__CONFIG_FILE": str(path),
        "DISTILL__TEACHER__WEIGHTS": str(weights),
        "DISTILL__TEACHER__EVAL_FIRST": False,
    }


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


def command(name: str, *arguments: Any) -> List[str]:
    """The command line of a tool."""
    return [sys.executable, f"tools/{name}.py", *map(str, arguments)]


def environment() -> Dict[str, str]:
    """One thread a process, so that results do not depend on the machine."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
