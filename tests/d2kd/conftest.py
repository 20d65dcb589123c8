"""A small PhotoDigits, and a teacher for it."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import config, model
from runs import ROOT, TINY, forget

import d2kd  # noqa: F401  (makes `detectron2` importable, also in processes that are spawned)
from d2kd.data.datasets import _registered
from detectron2.data import DatasetCatalog


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PhotoDigits with a few images of 64 x 64 pixels."""
    target = tmp_path_factory.mktemp("data") / "digits"
    command = [sys.executable, "datasets/prepare_photo_digits.py", "--output", str(target), "--image-size", "64"]
    numbers = ["--num-train", "24", "--num-val", "4", "--num-test", "4"]
    subprocess.run([*command, *numbers], check=True, cwd=ROOT, capture_output=True)
    return target


@pytest.fixture
def forget_datasets() -> Iterator[None]:
    """Forgets the datasets that a test registers."""
    before, modules = set(DatasetCatalog.list()), set(sys.modules)
    yield
    forget(set(DatasetCatalog.list()) - before)
    for name in set(sys.modules) - modules:  # a plugin that has registered them does so again for the next test
        folder = Path(getattr(sys.modules[name], "__file__", None) or "").parent
        if folder == Path(__file__).parent / "plugins" and hasattr(sys.modules[name], "DatasetCatalog"):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def forget_registered() -> Iterator[None]:
    """Forgets what `DATASETS.REGISTER` has registered, as reading a configuration does."""
    before = set(DatasetCatalog.list())
    yield
    forget((set(DatasetCatalog.list()) - before) & set(_registered))


@pytest.fixture
def golden(data_dir: Path) -> Callable[..., dict[str, torch.Tensor]]:
    """Reads values recorded from an official implementation, tests/data/golden/NAME.npz, by their names.

    With a `dtype`, arrays of floating-point numbers are of that type; single numbers stay as they were recorded.
    """

    def read(name: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        with np.load(data_dir / "golden" / f"{name}.npz") as file:
            arrays = {key: np.asarray(file[key]) for key in file.files}
        recorded = {k: v.tolist() if v.dtype.kind == "U" else torch.from_numpy(v) for k, v in arrays.items()}
        if dtype is not None:
            recorded = {
                k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() and v.dim() else v
                for k, v in recorded.items()
            }
        return recorded

    return read


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
def teacher(write_config: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
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
