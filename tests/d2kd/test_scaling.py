"""Configurations made for one batch size, or number of processes, run with another."""

import pytest
import torch
from models import config
from runs import read_checkpoint, run_training

from d2kd.data.datasets import register_datasets
from d2kd.distillers import DISTILLERS, FeatureMimic
from d2kd.engine import DistillTrainer, argument_parser, load_config
from d2kd.engine.epochs import resolve_epochs, with_iterations
from d2kd.engine.scaling import scale_to_batch, scale_to_processes
from d2kd.engine.setup import read_arguments
from d2kd.errors import ConfigError
from d2kd.settings import setting


def test_what_methods_count_in_iterations_is_scaled_with_the_solver():
    cfg = config(
        SOLVER__REFERENCE_WORLD_SIZE=8,
        SOLVER__MAX_ITER=90000,
        DISTILL__RECEPTIVE_TOKENS__WARMUP_ITERS=1000,
        DISTILL__CHANNEL_MATCHING__REFRESH_ITERS=[0, 700],
    )
    assert scale_to_processes(cfg, 8) is cfg
    assert scale_to_processes(config(), 2).DISTILL.RECEPTIVE_TOKENS.WARMUP_ITERS == 1000
    cfg.freeze()
    scaled = scale_to_processes(cfg, 2)
    assert (scaled.SOLVER.MAX_ITER, scaled.DISTILL.RECEPTIVE_TOKENS.WARMUP_ITERS) == (360000, 4000)
    node = scaled.DISTILL.CHANNEL_MATCHING
    assert (node.REFRESH_ITERS, node.REFRESH_PERIODS, node.REFRESH_STEPS) == ([0, 2800], [20000, 124000], [80000])
    assert scaled.is_frozen() and cfg.DISTILL.RECEPTIVE_TOKENS.WARMUP_ITERS == 1000


def test_lengths_that_are_no_iterations_stay():
    node = scale_to_processes(config(SOLVER__REFERENCE_WORLD_SIZE=4), 2).DISTILL
    assert (node.CHANNEL_MATCHING.TRACK_IMAGES, node.RECEPTIVE_TOKENS.LEARN.ITERATIONS) == (2000, 2000)


def test_iterations_of_a_method_of_ones_own_are_scaled(monkeypatch):
    class Patient(FeatureMimic):
        wait: int = setting(30, "Iterations to wait.", iterations=True)

    monkeypatch.setitem(DISTILLERS._obj_map, "Patient", Patient)
    assert scale_to_processes(config(SOLVER__REFERENCE_WORLD_SIZE=4), 2).DISTILL.PATIENT.WAIT == 60


def test_an_average_forgets_as_much_in_an_epoch():
    cfg = config(SOLVER__REFERENCE_WORLD_SIZE=8, SOLVER__EMA__DECAY=0.99, SOLVER__EMA__WARMUP=10.0)
    scaled = scale_to_processes(cfg, 2).SOLVER.EMA

    def age(decays):
        """Mean age of what the average holds, in steps."""
        mean = 0.0
        for decay in decays:
            mean = decay * (mean + 1)
        return mean

    for steps in (20, 400):  # in the warm-up and after it
        before = age([min(cfg.SOLVER.EMA.DECAY, (1 + t) / (10 + t)) for t in range(1, steps + 1)])
        after = age([min(scaled.DECAY, (1 + t) / (scaled.WARMUP + t)) for t in range(1, 4 * steps + 1)])
        assert after == pytest.approx(4 * before, rel=0.1)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"SOLVER__IMS_PER_BATCH": 6}, r"SOLVER\.IMS_PER_BATCH 6 cannot be divided"),
    ],
)
def test_what_cannot_be_scaled_is_an_error_of_the_users(changes, words):
    with pytest.raises(ConfigError, match=words):
        scale_to_processes(config(SOLVER__REFERENCE_WORLD_SIZE=4, **changes), 2)


def test_more_processes_than_iterations_of_a_period():
    node = config(DISTILL__CHANNEL_MATCHING__REFRESH_PERIODS=[1], DISTILL__CHANNEL_MATCHING__REFRESH_STEPS=[])
    node.SOLVER.REFERENCE_WORLD_SIZE = 1
    assert scale_to_processes(node, 8).DISTILL.CHANNEL_MATCHING.REFRESH_PERIODS == [1]


def test_the_trainer_scales(write_config, teacher):
    changes = dict(DISTILL__METHODS=["ChannelMatching"], SOLVER__REFERENCE_WORLD_SIZE=2, SOLVER__IMS_PER_BATCH=4)
    path = write_config(
        **changes,
        DISTILL__CHANNEL_MATCHING__REFRESH_PERIODS=[188],
        DISTILL__CHANNEL_MATCHING__REFRESH_STEPS=[],
        **teacher,
    )
    cfg = load_config(str(path))
    register_datasets(cfg)
    trainer = DistillTrainer(cfg)
    assert trainer.cfg.SOLVER.IMS_PER_BATCH == 2
    assert trainer.distilled.distillers["ChannelMatching"].schedule.periods == (4 * 94,)


# ---- SOLVER.REFERENCE_BATCH ----


def test_a_quarter_of_the_batch_by_the_linear_rule():
    cfg = config(
        SOLVER__REFERENCE_BATCH=16,
        SOLVER__IMS_PER_BATCH=2,
        SOLVER__ACCUMULATE=2,
        SOLVER__BASE_LR=0.01,
        SOLVER__BASE_LR_END=0.0001,
        SOLVER__MAX_ITER=90000,
        SOLVER__STEPS=[60000, 80000],
        SOLVER__WARMUP_ITERS=1000,
        SOLVER__CHECKPOINT_PERIOD=5000,
        TEST__EVAL_PERIOD=0,
        SOLVER__EMA__DECAY=0.9**4,
        DISTILL__RECEPTIVE_TOKENS__WARMUP_ITERS=500,
    )
    words = scale_to_batch(cfg)
    solver = cfg.SOLVER
    assert (solver.BASE_LR, solver.BASE_LR_END) == (0.0025, 0.000025)
    assert (solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS) == (360000, (240000, 320000), 4000)
    assert (solver.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD) == (20000, 0)
    assert solver.EMA.DECAY == pytest.approx(0.9)
    assert cfg.DISTILL.RECEPTIVE_TOKENS.WARMUP_ITERS == 2000 and cfg.DISTILL.RECEPTIVE_TOKENS.LEARN.ITERATIONS == 2000
    assert (solver.IMS_PER_BATCH, solver.ACCUMULATE) == (2, 2)
    assert words == (
        "SOLVER.REFERENCE_BATCH is 16, and an iteration has 4 images: by the linear rule BASE_LR 0.0025, not 0.01; "
        "BASE_LR_END 2.5e-05, not 0.0001; MAX_ITER 360000, not 90000; WARMUP_ITERS 4000, not 1000; "
        "CHECKPOINT_PERIOD 20000, not 5000; STEPS [240000, 320000], not [60000, 80000]."
    )
    assert scale_to_batch(cfg) == "" and solver.MAX_ITER == 360000  # once


@pytest.mark.parametrize("reference", [0, 4])
def test_nothing_is_scaled_unless_it_is_asked_for(reference):
    cfg = config(SOLVER__REFERENCE_BATCH=reference, SOLVER__IMS_PER_BATCH=4, SOLVER__MAX_ITER=10)
    cfg.freeze()
    assert with_iterations(cfg) is cfg


def test_recipes_are_as_they_are_written():
    assert load_config("configs/COCO/retinanet_R50_1x.yaml", ["MODEL.DEVICE", "cpu"]).SOLVER.REFERENCE_BATCH == 0


def test_larger_batches_never_come_to_no_iterations():
    cfg = config(SOLVER__REFERENCE_BATCH=1, SOLVER__IMS_PER_BATCH=64, SOLVER__MAX_ITER=10, SOLVER__STEPS=[3, 5])
    scale_to_batch(cfg)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.CHECKPOINT_PERIOD) == (1, (1,), 78)


@pytest.mark.parametrize("processes", [1, 2, 8])
def test_the_batch_and_the_number_of_processes_together(processes):
    keys = dict(SOLVER__BASE_LR=0.02, SOLVER__MAX_ITER=800, SOLVER__STEPS=[400], SOLVER__IMS_PER_BATCH=16)
    scaled = scale_to_processes(
        with_iterations(config(**keys, SOLVER__REFERENCE_BATCH=32, SOLVER__REFERENCE_WORLD_SIZE=4)), processes
    ).SOLVER
    images = 4 * processes
    assert (scaled.IMS_PER_BATCH, scaled.REFERENCE_BATCH) == (images, images)
    assert scaled.BASE_LR == pytest.approx(0.02 * images / 32)
    assert (scaled.MAX_ITER, scaled.STEPS) == (800 * 32 // images, (400 * 32 // images,))
    # the other way round is the same
    other = scale_to_processes(config(**keys, SOLVER__REFERENCE_BATCH=32, SOLVER__REFERENCE_WORLD_SIZE=4), processes)
    other = with_iterations(other).SOLVER
    assert other.EMA.DECAY == pytest.approx(scaled.EMA.DECAY)
    other.EMA.DECAY = scaled.EMA.DECAY
    assert other == scaled


def test_lengths_in_epochs_are_of_images_and_stay(monkeypatch):
    monkeypatch.setattr("d2kd.engine.epochs._count_images", lambda cfg: 100)
    cfg = config(SOLVER__REFERENCE_BATCH=16, SOLVER__IMS_PER_BATCH=4, SOLVER__MAX_EPOCHS=2.0, SOLVER__WARMUP_ITERS=10)
    words = scale_to_batch(cfg)
    resolve_epochs(cfg)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS) == (50, 40)
    assert "MAX_ITER" not in words and "WARMUP_ITERS 40, not 10" in words


def test_steps_of_a_longer_schedule_keep_their_places_in_short_epochs(monkeypatch):
    monkeypatch.setattr("d2kd.engine.epochs._count_images", lambda cfg: 100)
    keys = dict(SOLVER__IMS_PER_BATCH=4, SOLVER__MAX_EPOCHS=4.0, SOLVER__MAX_ITER=90000)
    cfg = config(**keys, SOLVER__STEPS=[60000, 80000])
    assert "SOLVER.STEPS [67, 89] (as far as [60000, 80000] of 90000)" in resolve_epochs(cfg)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (100, (67, 89))
    cfg = config(**keys, SOLVER__STEPS=[60, 80000])  # one of them was meant for this length
    resolve_epochs(cfg)
    assert cfg.SOLVER.STEPS == (60, 80000)


def test_a_warm_up_that_never_ends_is_told():
    notices = []
    load_config("configs/COCO/retinanet_R50_1x.yaml", ["MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", 500], [], notices)
    assert any("SOLVER.WARMUP_ITERS 1000 is not below MAX_ITER, 500" in notice for notice in notices)


def test_where_nothing_trains_nothing_is_told_of_the_schedule():
    options = ["MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", "500"]
    for words, told in (([], True), (["--eval-only"], False), (["--eval-teacher"], False), (["--check"], True)):
        notices = []
        args = argument_parser().parse_args([*words, "--config-file", "configs/COCO/retinanet_R50_1x.yaml", *options])
        cfg, _ = read_arguments(args, notices)
        assert any("SOLVER.WARMUP_ITERS" in notice for notice in notices) == told, words
        assert not cfg.SOLVER.STEPS  # as those behind the end are dropped
    assert [n for n in notices if "SOLVER.STEPS" in n]
    notices = []
    load_config("configs/COCO/retinanet_R50_1x.yaml", options, [], notices, trains=False)
    assert not notices


@pytest.mark.parametrize("value, words", [(-1, "at least 0"), (1.5, "of type int"), ("auto", "of type int")])
def test_a_reference_that_is_no_number_of_images(value, words):
    with pytest.raises(ConfigError, match=rf"SOLVER\.REFERENCE_BATCH.*{words}"):
        load_config("configs/COCO/retinanet_R50_1x.yaml", ["SOLVER.REFERENCE_BATCH", value])


def test_a_scaled_run_resumes_bit_by_bit(write_config, tmp_path, forget_datasets):
    keys = dict(SOLVER__REFERENCE_BATCH=4, SOLVER__IMS_PER_BATCH=2, DATASETS__TEST=[])
    keys |= dict(SOLVER__MAX_ITER=2, SOLVER__STEPS=[1], SOLVER__CHECKPOINT_PERIOD=1, SOLVER__WARMUP_ITERS=1)
    whole = run_training(write_config("whole", **keys))
    assert whole.cfg.SOLVER.MAX_ITER == 4 and whole.cfg.SOLVER.BASE_LR == 0.001
    path = write_config("parts", **keys)
    run_training(path, stop_at=2)
    run_training(path, resume=True)
    a, b = (read_checkpoint(tmp_path / name)["model"] for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    again = load_config(str(tmp_path / "whole/config.yaml"))  # what is in force is not scaled again
    assert (again.SOLVER.MAX_ITER, with_iterations(again).SOLVER.MAX_ITER) == (4, 4)


@pytest.mark.parametrize("reference, processes", [(1, 8), (8, 1)])
def test_the_last_learning_rate_is_scaled_as_the_first(reference, processes):
    cfg = config(SOLVER__REFERENCE_WORLD_SIZE=reference, SOLVER__IMS_PER_BATCH=16, SOLVER__BASE_LR_END=0.001)
    scaled = scale_to_processes(cfg, processes).SOLVER
    assert scaled.BASE_LR_END / scaled.BASE_LR == pytest.approx(0.001 / cfg.SOLVER.BASE_LR)
