"""Trainings that read the teacher's features from the disk: they end as with an empty cache, bit by bit."""

from pathlib import Path
from typing import Any

import torch
from runs import read_checkpoint, run_training

import d2kd  # noqa: F401  (makes `detectron2` importable)

MIMIC = {"DISTILL__METHODS": ["FeatureMimic"], "TEST__EVAL_PERIOD": 0, "DATASETS__TEST": []}


def entries(folder: Path) -> list[Path]:
    """The files of a cache."""
    return sorted(path for path in folder.rglob("*.safetensors") if not path.name.startswith("."))


def weights(folder: Path, name: str = "model_final") -> dict[str, Any]:
    """What a training has learned: the student and what was trained beside it."""
    saved = read_checkpoint(folder, name)
    return {**saved["model"], **{f"{k}.{n}": v for k, d in saved["distillers"].items() for n, v in d.items()}}


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Bit by bit."""
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours if torch.is_tensor(ours[k]))


def test_students_are_equal_with_an_empty_a_half_filled_and_a_full_cache(write_config, teacher, tmp_path) -> None:
    cache = tmp_path / "cache"
    path = write_config(**MIMIC, **teacher, DISTILL__CACHE__DIR=str(cache))
    empty = run_training(path, OUTPUT_DIR=str(tmp_path / "empty"))
    dense = empty.distilled.passes.dense
    dense.cache.flush()
    print(dense.cache.hits, dense.cache.misses, len(entries(cache)))
    full = run_training(path, OUTPUT_DIR=str(tmp_path / "full"))
    print(full.distilled.passes.dense.cache.hits, full.distilled.passes.dense.cache.misses)
    for file in entries(cache)[::2]:
        file.unlink()
    half = run_training(path, OUTPUT_DIR=str(tmp_path / "half"))
    print(half.distilled.passes.dense.cache.hits, half.distilled.passes.dense.cache.misses)
    run_training(path, OUTPUT_DIR=str(tmp_path / "none"), DISTILL__CACHE__DIR="")
    assert_equal(weights(tmp_path / "empty"), weights(tmp_path / "full"))
    assert_equal(weights(tmp_path / "empty"), weights(tmp_path / "half"))
    assert_equal(weights(tmp_path / "empty"), weights(tmp_path / "none"))
