"""Whole runs of segmentors on PhotoDigits label maps: resuming, two processes, evaluation, tokens, schedule."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_tensors
from models import config, model
from runs import TINY, in_two_processes, make_trainer, read_checkpoint, run_training
from segmentors import PSP, SEGMENTOR

import d2kd  # noqa: F401  (makes `detectron2` importable, also in processes that are spawned)
from d2kd.distillers.receptive_tokens import TokenFile
from d2kd.engine import DistillTrainer, load_config
from d2kd.engine.evaluation import evaluate_student
from d2kd.engine.schedule import build_lr_scheduler
from d2kd.engine.train_step import TrainingError
from d2kd.modeling import load_strictly
from d2kd.token_learning import TokenTrainer
from detectron2.utils import comm

PLUGIN = str(Path(__file__).parent / "plugins/digit_labels.py")
MAIN, AUX = "sem_seg_head.predictor", "sem_seg_head.auxiliary.predictor"
RUN: dict[str, Any] = {
    **{key: value for key, value in TINY.items() if "RETINANET" not in key},
    "DISTILL.IMPORTS": [PLUGIN],
    "DATASETS.TRAIN": ["digit_labels_train"],
    "DATASETS.TEST": ["digit_labels_val"],
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 11,
    "INPUT.CROP.ENABLED": True,
    "INPUT.CROP.TYPE": "absolute",
    "INPUT.CROP.SIZE": [48, 56],
    "SOLVER.LR_SCHEDULER_NAME": "WarmupPolyLR",
    "SOLVER.BASE_LR": 0.02,
    "SOLVER.BASE_LR_END": 0.001,
    "TEST.SLIDING_WINDOW.ENABLED": True,
    "TEST.SLIDING_WINDOW.SIZE": [48, 40],
    "TEST.SLIDING_WINDOW.STRIDE": [32, 16],
    "DISTILL.TEACHER.EVAL_FIRST": False,
}
METHODS = {
    "DISTILL__METHODS": ["MaskedGenerative", "LogitKD"],
    "DISTILL__MASKED_GENERATIVE__TAPS": ["res5"],
}


@pytest.fixture
def write(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes the YAML of a small segmentor on the label maps; keyword arguments are keys with '__' for '.'."""
    monkeypatch.setenv("D2KD_TEST_DIGITS", str(digits))

    def write(name: str = "student", base: dict[str, Any] = PSP, **changes: Any) -> Path:
        cfg = config({**base, **RUN}, OUTPUT_DIR=str(tmp_path / name), **changes)
        path = tmp_path / f"{name}.yaml"
        path.write_text(cfg.dump())
        return path

    return write


@pytest.fixture
def teacher(write: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    """A wider, untrained DeepLabV3; the keys that name it."""
    path = write("teacher", SEGMENTOR, MODEL__RESNETS__RES2_OUT_CHANNELS=6)
    cfg = config({**SEGMENTOR, **RUN}, MODEL__RESNETS__RES2_OUT_CHANNELS=6)
    torch.save({"model": model(cfg, seed=7).state_dict()}, tmp_path / "teacher.pth")
    return {
        "DISTILL__TEACHER__CONFIG_FILE": str(path),
        "DISTILL__TEACHER__WEIGHTS": str(tmp_path / "teacher.pth"),
        "DISTILL__INIT_FROM_TEACHER__ENABLED": False,
    }


def test_a_distilled_run_resumes_bit_equal_and_its_checkpoint_is_the_student(write, teacher, tmp_path):
    path = write(**METHODS, **teacher)
    run_training(path, OUTPUT_DIR=str(tmp_path / "whole"))
    run_training(path, OUTPUT_DIR=str(tmp_path / "parts"), stop_at=3)
    trainer = run_training(path, OUTPUT_DIR=str(tmp_path / "parts"), resume=True)
    whole, parts = read_checkpoint(tmp_path / "whole"), read_checkpoint(tmp_path / "parts")
    assert same_tensors(whole["model"], parts["model"])
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    load_strictly(model(config({**PSP, **RUN})), str(tmp_path / "whole/model_final.pth"), "student", "here")
    results = [json.loads((tmp_path / name / "result.json").read_text())["metrics"] for name in ("whole", "parts")]
    assert results[0] == results[1] and 0 <= results[0]["sem_seg"]["mIoU"] <= 100


def test_windows_and_test_augmentation_work_in_evaluation_only(write, tmp_path):
    path = write(SOLVER__MAX_ITER=2)
    run_training(path)
    final = tmp_path / "student/model_final.pth"
    more = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (48, 64), "OUTPUT_DIR", str(tmp_path / "again")]
    cfg = load_config(str(path), ["MODEL.WEIGHTS", str(final), *more])
    evaluate_student(DistillTrainer, cfg, resume=False)  # what --eval-only calls
    again = json.loads((tmp_path / "again/result.json").read_text())["metrics"]
    assert again["sem_seg"] == json.loads((tmp_path / "student/result.json").read_text())["metrics"]["sem_seg"]
    assert set(again) == {"sem_seg", "sem_seg_TTA"} and again["sem_seg_TTA"]["pACC"] > 0


def two_processes(path: str, output: str) -> None:
    """Two steps on each process; each writes its student."""
    trainer = make_trainer(Path(path), DATASETS__TEST=[], SOLVER__MAX_ITER=2)
    trainer.resume_or_load(resume=False)
    trainer.train()
    torch.save(trainer.student.state_dict(), Path(output, f"rank{comm.get_rank()}.pth"))


def test_two_processes_with_shared_batch_norms_stay_in_step(write, teacher, tmp_path):
    shared = {"MODEL__RESNETS__NORM": "naiveSyncBN", "MODEL__SEM_SEG_HEAD__NORM": "naiveSyncBN"}
    path = write(**METHODS, **teacher, **shared)
    in_two_processes(two_processes, path, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{i}.pth") for i in (0, 1))
    before = make_trainer(path).student.state_dict()
    assert same_tensors(first, second)  # running statistics too
    assert all(not torch.equal(first[name], before[name]) for name in first if name.endswith("weight"))


def test_tokens_are_learned_on_logits_and_used_for_both_heads(write, teacher, tmp_path):
    learn = {
        "ITERATIONS": 2,
        "NUM_TOKENS": 3,
        "WEIGHTING": False,
        "OPTIMIZER": "SGD",
        "SCHEDULE": "poly",
        "PICTURES": 1,
    }
    keys = {f"DISTILL__RECEPTIVE_TOKENS__LEARN__{key}": value for key, value in learn.items()}
    path = write(
        "tokens", SEGMENTOR, MODEL__RESNETS__RES2_OUT_CHANNELS=6, DISTILL__RECEPTIVE_TOKENS__TAPS=[MAIN], **keys
    )
    weights = teacher["DISTILL__TEACHER__WEIGHTS"]
    trainer = run_training(path, trainer_class=TokenTrainer, MODEL__WEIGHTS=weights)
    learned = TokenFile.load(trainer.result_file)
    assert learned.levels[MAIN].tokens.tokens.shape == (3, 11) and list(learned.levels) == [MAIN]
    node = {"FILE": trainer.result_file, "TAPS": [MAIN, AUX], "TOKEN_TAPS": [MAIN, MAIN], "CUSTOMIZE": False}
    node |= {"TAP_WEIGHTS": [1.0, 0.4], "NORMALIZE": "none", "POSITION_WEIGHTS": "mask_sum", "EPS": 1e-5, "WEIGHT": 0.5}
    keys = {f"DISTILL__RECEPTIVE_TOKENS__{key}": value for key, value in node.items()}
    run_training(write(DISTILL__METHODS=["ReceptiveTokens"], SOLVER__MAX_ITER=2, **keys, **teacher))
    logged = [json.loads(line) for line in (tmp_path / "student/metrics.json").read_text().splitlines()]
    assert {f"distill/ReceptiveTokens/{tap}" for tap in (MAIN, AUX)} <= {key for line in logged for key in line}


def test_one_image_a_batch_is_too_few_for_the_pooled_map_and_said_so(write):
    with pytest.raises(TrainingError, match=r"sem_seg_head\.context.*one value a channel.*MODEL\.SEM_SEG_HEAD\.NORM"):
        run_training(write(SOLVER__IMS_PER_BATCH=1, SOLVER__MAX_ITER=1, DATASETS__TEST=[]))
    run_training(write(SOLVER__IMS_PER_BATCH=1, SOLVER__MAX_ITER=1, MODEL__SEM_SEG_HEAD__NORM=""), DATASETS__TEST=[])


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_polynomial_schedule_falls_to_its_floor(warmup):
    keys = {"BASE_LR": 0.01, "BASE_LR_END": 1e-4, "MAX_ITER": 50, "WARMUP_ITERS": warmup, "WARMUP_FACTOR": 0.1}
    cfg = config(SOLVER__LR_SCHEDULER_NAME="WarmupPolyLR", **{f"SOLVER__{key}": value for key, value in keys.items()})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    scheduler = build_lr_scheduler(cfg, optimizer)
    for t in range(51):
        want = (0.01 - 1e-4) * math.pow(1 - t / 50, 0.9) + 1e-4
        if t >= warmup:
            assert optimizer.param_groups[0]["lr"] == pytest.approx(want, rel=1e-9)
        else:
            assert optimizer.param_groups[0]["lr"] < want
        if t == 20:  # as a resumed run does
            state, optimizer = scheduler.state_dict(), torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
            scheduler = build_lr_scheduler(cfg, optimizer)
            scheduler.load_state_dict(state)
        optimizer.step()
        scheduler.step()
