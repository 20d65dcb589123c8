"""Trainings that read the teacher's features from the disk, and those that need the teacher in some iterations only."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import same_tensors
from models import FASTER_RCNN, batch, config, model, write_teacher
from runs import ROOT, environment, in_two_processes, make_trainer, read_checkpoint, run_training

import d2kd  # noqa: F401  (makes `detectron2` importable, also in processes that are spawned)
from d2kd.cli import main as program
from d2kd.data.datasets import register_datasets
from d2kd.data.draws import endless_draws, mixes_sizes, ways_to_augment
from d2kd.data.loader import build_train_loader
from d2kd.engine import DistillTrainer, load_config
from d2kd.engine.cache_building import build_cache
from d2kd.errors import ConfigError, UserError
from d2kd.modeling import Teacher, build_distilled_model
from d2kd.modeling.feature_cache import FOUND, GB, FeatureStore
from d2kd.modeling.teacher_passes import Acceleration, CachedDensePass, DensePass
from d2kd.modeling.teacher_passes.build import _dense_pass
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

MIMIC = {"DISTILL__METHODS": ["FeatureMimic"], "DATASETS__TEST": [], "SOLVER__MAX_ITER": 4, "SOLVER__STEPS": []}
FOUR = {**MIMIC, "SOLVER__CHECKPOINT_PERIOD": 2}


def entries(folder: Path) -> list[Path]:
    """The files of a cache."""
    return sorted(path for path in folder.rglob("*.safetensors") if not path.name.startswith("."))


def learned(folder: Path) -> dict[str, Any]:
    """What a training has learned: the student, and what was trained beside it."""
    saved = read_checkpoint(folder)
    return {**saved["model"], **{k: v for k, v in saved["distillers"].items() if torch.is_tensor(v)}}


def cache_of(trainer: Any) -> Any:
    """The cache of a trainer, with everything written."""
    cache = trainer.distilled.passes.dense.cache
    cache.flush()
    return cache


# ---- equal to running the teacher ----


def test_students_are_equal_without_a_cache_and_with_an_empty_a_full_and_a_damaged_one(write_config, teacher, tmp_path):
    """The loader's process reads the full one."""
    folder = tmp_path / "cache"
    path = write_config(**MIMIC, **teacher, DISTILL__CACHE__DIR=str(folder))
    build_distilled_model(load_config(str(path)))
    assert not folder.exists(), "a model alone needs no folder"
    counts = {}
    for name in ("empty", "full", "half"):
        workers = int(name == "full")
        cache = cache_of(run_training(path, OUTPUT_DIR=str(tmp_path / name), DATALOADER__NUM_WORKERS=workers))
        counts[name] = cache.hits, cache.misses
        if name == "full":
            for file in entries(folder)[::2]:
                file.unlink()
            first, second, third, *_ = entries(folder)
            first.write_bytes(first.read_bytes()[:100])
            second.write_bytes(second.read_bytes()[:-1] + b"x")
            third.write_bytes(b"")
    assert counts == {"empty": (0, 16), "full": (16, 0), "half": (5, 11)}
    assert cache.store.damaged == 3 and len(entries(folder)) == 16
    images = next(iter(make_trainer(path, DATALOADER__NUM_WORKERS=1).data_loader))
    assert all(x[FOUND].entry is not None for x in images)
    run_training(path, OUTPUT_DIR=str(tmp_path / "none"), DISTILL__CACHE__DIR="")
    assert all(same_tensors(learned(tmp_path / "none"), learned(tmp_path / name)) for name in counts)


def test_weight_zero_is_the_plain_student(write_config, teacher, tmp_path):
    changes = {"DISTILL__INIT_FROM_TEACHER__ENABLED": False, "DISTILL__FEATURE_MIMIC__WEIGHT": 0.0}
    path = write_config(**MIMIC, **changes, **teacher, DISTILL__CACHE__DIR=str(tmp_path / "cache"))
    cache_of(run_training(path, OUTPUT_DIR=str(tmp_path / "zero")))
    run_training(
        path, OUTPUT_DIR=str(tmp_path / "plain"), DISTILL__TEACHER__CONFIG_FILE="", DISTILL__TEACHER__WEIGHTS=""
    )
    assert same_tensors(read_checkpoint(tmp_path / "plain")["model"], read_checkpoint(tmp_path / "zero")["model"])


KILLED = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from runs import run_training
from d2kd.modeling.feature_cache import FeatureStore
write, output = Path.write_bytes, Path(sys.argv[2])

def half(path, content):
    time.sleep(0.02)
    if (output / "last_checkpoint").exists():
        write(path, content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, content)

Path.write_bytes = half
run_training(Path(sys.argv[1]), OUTPUT_DIR=str(output))
"""


def test_killed_while_an_entry_is_written_and_resumed_is_bit_equal(write_config, teacher, tmp_path):
    folder = tmp_path / "cache"
    path = write_config(**FOUR, **teacher, DISTILL__CACHE__DIR=str(folder))
    environ = {**environment(), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/d2kd'}"}
    command = [sys.executable, "-c", KILLED, str(path), str(tmp_path / "killed")]
    process = subprocess.run(command, env=environ, capture_output=True, cwd=ROOT, timeout=200)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not (tmp_path / "killed/model_final.pth").exists()
    written = entries(folder)
    assert written and [path for path in folder.rglob(".*.tmp.safetensors")], "an entry was half written"
    trainer = run_training(path, resume=True, OUTPUT_DIR=str(tmp_path / "killed"))
    assert trainer.start_iter == 2 and cache_of(trainer).store.damaged == 0
    run_training(path, OUTPUT_DIR=str(tmp_path / "whole"), DISTILL__CACHE__DIR="")
    assert same_tensors(learned(tmp_path / "whole"), learned(tmp_path / "killed"))


def _two_processes(path: str, output: str) -> None:
    torch.set_num_threads(1)
    for name, changes in (("none", ["DISTILL.CACHE.DIR", ""]), ("empty", []), ("full", [])):
        cfg = load_config(path, ["OUTPUT_DIR", f"{output}/{name}", *changes])
        register_datasets(cfg)
        torch.manual_seed(cfg.SEED + comm.get_rank())
        trainer = DistillTrainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
        assert not trainer.model.find_unused_parameters
        first, second = comm.all_gather([p.double().sum().item() for p in trainer.distilled.parameters()])
        assert first == second
        if name in ("empty", "full"):
            assert cache_of(trainer).misses == (4 if name == "empty" else 0)
        comm.synchronize()


def test_two_processes_share_a_cache_in_step(write_config, teacher, tmp_path):
    changes = {**MIMIC, "DISTILL__TEACHER__EVERY": 2}
    path = write_config(**changes, **teacher, DISTILL__CACHE__DIR=str(tmp_path / "cache"))
    in_two_processes(_two_processes, path, tmp_path)
    assert len(entries(tmp_path / "cache")) == 8
    assert all(same_tensors(learned(tmp_path / "none"), learned(tmp_path / name)) for name in ("empty", "full"))


def test_maps_that_regions_are_pooled_from_are_kept(tmp_path, caplog):
    named = write_teacher(tmp_path, config(FASTER_RCNN, MODEL__RESNETS__RES2_OUT_CHANNELS=32))
    cfg = config(FASTER_RCNN, DISTILL__METHODS=["LogitKD"], **named)
    losses = []
    for folder in ("", str(tmp_path / "cache"), str(tmp_path / "cache")):
        cfg.DISTILL.CACHE.DIR = folder
        torch.manual_seed(3)
        net = build_distilled_model(cfg).train()
        torch.manual_seed(4)
        with EventStorage():
            losses.append(net(batch([(64, 64)])))
        if folder:
            net.passes.dense.cache.flush()
    assert net.passes.dense.cache.misses == 0
    assert same_tensors(losses[0], losses[1]) and same_tensors(losses[0], losses[2])
    assert "does not keep what RegionPass gives" in caplog.text


def test_what_depends_on_the_student_is_not_kept_and_said(tmp_path, caplog):
    cfg = config(DISTILL__CACHE__DIR=str(tmp_path / "cache"))
    teacher = Teacher(model(config()))
    steered = mock.Mock(needs_student=True)
    dense = _dense_pass(cfg, teacher, [], {"MaskedTeacher": steered}, Acceleration())
    assert type(dense) is DensePass and not (tmp_path / "cache").exists()
    first, second = (record.message for record in caplog.records)
    assert "does not keep what MaskedTeacher gives: it depends on the student, and is computed in every step." in first
    assert "DISTILL.CACHE.DIR has no effect" in second


def test_what_a_method_looks_at_between_steps_is_not_kept_and_said(write_config, teacher, tmp_path, caplog):
    matching = {
        "DISTILL__METHODS": ["ChannelMatching"],
        "DISTILL__CHANNEL_MATCHING__TAPS": ["res4.pre_relu"],
        "DISTILL__CHANNEL_MATCHING__TRACKING": "pass",
        "DISTILL__CHANNEL_MATCHING__TRACK_IMAGES": 8,
        "SOLVER__MAX_ITER": 2,
    }
    path = write_config(**{**MIMIC, **matching}, **teacher, DISTILL__CACHE__DIR=str(tmp_path / "cache"))
    trainer = run_training(path, OUTPUT_DIR=str(tmp_path / "cached"))
    assert cache_of(trainer).misses == 8 == len(entries(tmp_path / "cache")), "of the steps alone"
    assert "does not keep what ChannelMatching looks at between steps: the teacher runs there" in caplog.text
    run_training(path, OUTPUT_DIR=str(tmp_path / "none"), DISTILL__CACHE__DIR="")
    assert same_tensors(learned(tmp_path / "none"), learned(tmp_path / "cached"))


# ---- what an entry belongs to ----


def test_another_teacher_other_taps_precision_or_form_are_other_collections(write_config, teacher, tmp_path):
    path = write_config(**MIMIC, **teacher, DISTILL__CACHE__DIR=str(tmp_path / "cache"))
    weights = torch.load(teacher["DISTILL__TEACHER__WEIGHTS"])
    name = next(iter(weights["model"]))
    weights["model"][name].flatten()[0] += 1e-3
    torch.save(weights, tmp_path / "other.pth")
    changes: list[dict[str, Any]] = [
        {},
        {"DISTILL__TEACHER__WEIGHTS": str(tmp_path / "other.pth")},
        {"DISTILL__TEACHER__OPTS": ["MODEL.FPN.FUSE_TYPE", "avg"]},
        {"DISTILL__TEACHER__PRECISION": "bfloat16"},
        {"DISTILL__TEACHER__FOLD_NORMS": True},
        {"DISTILL__FEATURE_MIMIC__TAPS": ["p3"]},
        {"DISTILL__CACHE__DTYPE": "int8"},
        {"DISTILL__CACHE__RUN": "image"},
        {"INPUT__FORMAT": "RGB"},
    ]
    collections = [make_trainer(path, **change).distilled.passes.dense.cache.collection for change in changes]
    assert len(set(collections)) == len(changes)
    same = [
        {"SEED": 5},
        {"DISTILL__FEATURE_MIMIC__WEIGHT": 3.0},
        {"DISTILL__TEACHER__EVERY": 2, "DISTILL__TEACHER__STREAM": True},
    ]
    assert {make_trainer(path, **change).distilled.passes.dense.cache.collection for change in same} == {collections[0]}


def test_a_folder_that_cannot_be_written_is_told_before_training(write_config, teacher, tmp_path):
    (tmp_path / "file").write_text("")
    path = write_config(**MIMIC, **teacher, DISTILL__CACHE__DIR=str(tmp_path / "file/cache"))
    with pytest.raises(ConfigError, match=r"DISTILL\.CACHE\.DIR is .*cannot be written .*name another folder"):
        make_trainer(path)


# ---- augmentation ----

DRAWN = {"INPUT__MIN_SIZE_TRAIN": [48, 64], "INPUT__MIN_SIZE_TRAIN_SAMPLING": "range"}


def test_augmentation_without_an_end_is_told_and_the_teacher_runs(write_config, teacher, tmp_path, caplog):
    path = write_config(**MIMIC, **DRAWN, **teacher, DISTILL__CACHE__DIR=str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(path)
    assert type(trainer.distilled.passes.dense) is DensePass
    (line,) = [record.message for record in caplog.records if "DISTILL.CACHE.DIR has no effect" in record.message]
    assert "the teacher runs: INPUT.MIN_SIZE_TRAIN_SAMPLING is range: set it to choice" in line
    trainer = make_trainer(path, DATALOADER__DRAWS=3)
    assert isinstance(trainer.distilled.passes.dense, CachedDensePass)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"INPUT__CROP__ENABLED": True}, "INPUT.CROP.ENABLED"),
        ({"INPUT__MIN_SIZE_TRAIN": [48, 56, 64], "INPUT__RANDOM_FLIP": "vertical"}, ""),
        ({**DRAWN, "INPUT__MIN_SIZE_TRAIN": [64, 64]}, ""),
        ({**DRAWN, "DATALOADER__DRAWS": 2}, ""),
    ],
)
def test_which_augmentations_have_an_end(write_config, changes, words):
    cfg = load_config(str(write_config(**changes)))
    register_datasets(cfg)
    problem = endless_draws(cfg, build_train_loader(cfg))
    assert words in problem and bool(words) == bool(problem)


def test_every_way_to_augment_is_listed(write_config):
    cfg = load_config(str(write_config(INPUT__MIN_SIZE_TRAIN=[48, 56, 64])))
    register_datasets(cfg)
    ways = ways_to_augment(build_train_loader(cfg).mapper)
    assert ways is not None
    assert {(w[0].short_edge_length[0], w[1].prob) for w in ways} == {(s, p) for s in (48, 56, 64) for p in (0.0, 1.0)}


def test_a_few_draws_are_the_same_in_every_run(write_config):
    """Each image comes in at most so many ways, whatever the seed and the process."""
    seen: dict[int, set[bytes]] = {}
    for seed in (1, 2):
        cfg = load_config(str(write_config(**DRAWN, DATALOADER__DRAWS=2, SEED=seed)))
        register_datasets(cfg)
        loader = build_train_loader(cfg)
        for _, images in zip(range(24), loader):
            for x in images:
                seen.setdefault(x["image_id"], set()).add(np.asarray(x["image"]).tobytes())
    assert max(len(ways) for ways in seen.values()) == 2
    assert sum(len(ways) for ways in seen.values()) > 1.5 * len(seen)


# ---- the command ----


@pytest.mark.parametrize("changes", [{}, {"DATALOADER__DRAWS": 2, "DISTILL__CACHE__RUN": "image"}])
def test_after_it_is_built_a_training_runs_no_teacher(write_config, teacher, tmp_path, changes):
    folder = tmp_path / "cache"
    path = write_config(**MIMIC, **changes, **teacher, DISTILL__CACHE__DIR=str(folder), DISTILL__CACHE__DTYPE="int8")
    cfg = load_config(str(path))
    register_datasets(cfg)
    built = build_cache(cfg)
    images = len(list(build_train_loader(cfg).records))
    assert built.computed >= 2 * images - 2 and len(entries(folder)) <= 2 * images
    for seed in (1, 9):
        assert cache_of(run_training(path, SEED=seed)).misses == 0
    assert build_cache(cfg).computed == 0


def build_with(write_config, teacher, folder, **changes):
    cfg = load_config(str(write_config(**MIMIC, **teacher, DISTILL__CACHE__DIR=str(folder), **changes)))
    register_datasets(cfg)
    return build_cache(cfg)


def test_what_does_not_fit_is_not_built(write_config, teacher, tmp_path):
    folder = tmp_path / "cache"
    build_with(write_config, teacher, folder)
    size = sum(entry.size for entry in FeatureStore(folder, 0).entries())
    count = len(entries(folder))
    for share, words in (
        (0.5, "together they are more than DISTILL.CACHE.MAX_GB"),
        (0.01, "one takes 0.00 MB, more than"),
    ):
        other = tmp_path / f"cache_{share}"
        with pytest.raises(ConfigError, match=rf"cannot keep the features of all images \({words}") as error:
            build_with(write_config, teacher, other, DISTILL__CACHE__MAX_GB=share * size / GB)
        held = len(entries(other))
        assert held < count and f"it holds those of {held}, which trainings read" in str(error.value)
    # entries of long ago make room for others without a word
    for entry in FeatureStore(folder, 0).entries():
        os.utime(entry.path, (1e9, 1e9))
    built = build_with(write_config, teacher, folder, DISTILL__CACHE__MAX_GB=1.1 * size / GB, INPUT__RANDOM_FLIP="none")
    assert built.found + built.computed >= count / 2


def test_a_full_disk_ends_the_building(write_config, teacher, tmp_path, monkeypatch):
    written, passes, write, run = [], [], FeatureStore.write, CachedDensePass.__call__

    def full(store, collection, key, content):
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(key)
        return write(store, collection, key, content)

    monkeypatch.setattr(FeatureStore, "write", full)
    monkeypatch.setattr(CachedDensePass, "__call__", lambda *arguments: passes.append(1) or run(*arguments))
    with pytest.raises(
        ConfigError, match=r"\(No space left on device\): it holds those of 3, which trainings read. Make"
    ):
        build_with(write_config, teacher, tmp_path / "cache")
    assert len(entries(tmp_path / "cache")) == 3 and len(passes) < 16


def test_batches_of_several_sizes_are_built_as_they_will_come(write_config, teacher, tmp_path):
    sizes = {"INPUT__MIN_SIZE_TRAIN": [48, 64]}
    path = write_config(**MIMIC, **sizes, **teacher, DISTILL__CACHE__DIR=str(tmp_path / "cache"))
    cfg = load_config(str(path))
    register_datasets(cfg)
    assert build_cache(cfg) == (0, 16)
    assert cache_of(run_training(path)).misses == 0
    with pytest.raises(ConfigError, match="SEED is negative.*or DISTILL.CACHE.RUN to image"):
        cfg.SEED = -1
        build_cache(cfg)


def test_the_command_describes_and_empties(write_config, teacher, tmp_path, capsys):
    folder = tmp_path / "cache"
    path = write_config(**MIMIC, **teacher, DISTILL__CACHE__DIR=str(folder))
    cache = cache_of(run_training(path))
    program(["cache", "info", str(folder)])
    text = capsys.readouterr().out
    assert cache.collection in text and "RetinaNet" in text and "16, 0.00" in text and "p3, p4" in text
    with pytest.raises(SystemExit):
        program(["cache", "clear", str(folder), "--collection", "abc"])
    assert "--collection is 'abc'" in capsys.readouterr().err
    program(["cache", "clear", str(folder), "--collection", cache.collection])
    assert "16 entries removed" in capsys.readouterr().out and not entries(folder)
    with pytest.raises(SystemExit):
        program(["cache", "info", str(tmp_path)])
    assert "is no cache of features" in capsys.readouterr().err


# ---- the teacher in some iterations only ----


def test_the_teacher_takes_part_in_every_third_iteration_with_three_times_the_weight(tmp_path):
    cfg = config(**write_teacher(tmp_path), DISTILL__METHODS=["FeatureMimic"], DISTILL__TEACHER__EVERY=3)
    gradients: dict[int, dict[str, Any]] = {}
    for iteration in (0, 1, 3):
        torch.manual_seed(3)
        net = build_distilled_model(cfg).train()
        with EventStorage(iteration):
            losses = net(batch())
        assert any(name.startswith("distill/") for name in losses) == (iteration != 1)
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in net.distillers.parameters())
        gradients[iteration] = {name: p.grad for name, p in net.student.named_parameters()}
        if iteration == 3:
            thrice = {name: loss for name, loss in losses.items() if name.startswith("distill/")}
    torch.manual_seed(3)
    plain = build_model(cfg).train()
    with EventStorage():
        sum(plain(batch()).values()).backward()
    assert same_tensors(gradients[1], {name: p.grad for name, p in plain.named_parameters()})
    cfg.DISTILL.TEACHER.EVERY = 1
    torch.manual_seed(3)
    with EventStorage(3):
        once = build_distilled_model(cfg).train()(batch())
    assert all(torch.equal(loss, 3 * once[name]) for name, loss in thrice.items())


def test_every_other_iteration_is_resumed_bit_equal(write_config, teacher, tmp_path):
    changes = {**MIMIC, "SOLVER__CHECKPOINT_PERIOD": 3, "DISTILL__METHODS": ["MaskedGenerative"]}
    path = write_config(**changes, **teacher, DISTILL__TEACHER__EVERY=2)
    whole = run_training(path, OUTPUT_DIR=str(tmp_path / "whole"))
    run_training(path, OUTPUT_DIR=str(tmp_path / "parts"), stop_at=3)
    run_training(path, OUTPUT_DIR=str(tmp_path / "parts"), resume=True)
    assert same_tensors(learned(tmp_path / "whole"), learned(tmp_path / "parts"))
    assert whole.teacher_time.seconds > 0
    with pytest.raises(UserError, match=r"TEACHER\.EVERY was 2 and is 1, and cannot change within a run"):
        run_training(path, OUTPUT_DIR=str(tmp_path / "parts"), resume=True, DISTILL__TEACHER__EVERY=1)


def test_the_loader_reads_entries_for_those_iterations_alone(write_config, teacher, tmp_path):
    path = write_config(**MIMIC, **teacher, DISTILL__CACHE__DIR=str(tmp_path / "cache"), DISTILL__TEACHER__EVERY=2)
    assert cache_of(run_training(path)).misses == 8
    batches = [images for _, images in zip(range(4), make_trainer(path).data_loader)]
    assert [all(FOUND in x for x in images) for images in batches] == [True, False, True, False]


def test_what_methods_count_in_iterations_stays_in_iterations(tmp_path):
    cfg = config(
        **write_teacher(tmp_path),
        DISTILL__METHODS=["ChannelMatching"],
        DISTILL__TEACHER__EVERY=4,
        DISTILL__CHANNEL_MATCHING__TAPS=["res4.pre_relu"],
        DISTILL__CHANNEL_MATCHING__REFRESH_ITERS=[0, 400],
    )
    assert list(build_distilled_model(cfg).distillers["ChannelMatching"].refresh_iters) == [0, 100]


def test_a_run_says_what_its_teacher_took(write_config, teacher, tmp_path):
    changes = {**MIMIC, "DATASETS__TEST": ["digits_val"]}
    run_training(write_config(**changes, **teacher))
    result = json.loads((tmp_path / "student/result.json").read_text())
    assert 0 < result["teacher_time_s"] < result["wall_time_s"]
    rows = [json.loads(line) for line in (tmp_path / "student/metrics.json").read_text().splitlines()]
    assert any("wall_time" in row and "teacher_time" in row for row in rows)


@pytest.mark.parametrize(
    ("sizes", "mixed"), [([(4, 5)] * 3, False), ([(4, 5), (5, 4)], True), ([(None, None)] * 3, True), ([], False)]
)
def test_images_whose_size_is_not_known_may_be_of_several(sizes, mixed):
    records = [{"height": height, "width": width} for height, width in sizes]
    loader = SimpleNamespace(records=records, batch_size=2, draws=0)
    assert mixes_sizes(config(INPUT__MIN_SIZE_TRAIN=[64]), loader) == mixed
