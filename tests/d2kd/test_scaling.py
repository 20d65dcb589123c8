"""Configurations made for one number of processes, run with another."""

import pytest
from models import config

from d2kd.data.datasets import register_datasets
from d2kd.distillers import DISTILLERS, FeatureMimic
from d2kd.engine import DistillTrainer, load_config
from d2kd.engine.scaling import scale_to_processes
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
