"""Configurations made for one number of processes, run with another."""

import pytest
from models import config

from d2kd.data.datasets import register_datasets
from d2kd.engine import ConfigError, DistillTrainer, load_config
from d2kd.engine.scaling import scale_to_processes


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


def test_a_preset_is_scaled_too():
    preset = config(DISTILL__CHANNEL_MATCHING__PRESET="imagenet_r50_mobilenet_v1", SOLVER__REFERENCE_WORLD_SIZE=4)
    node = scale_to_processes(preset, 2).DISTILL.CHANNEL_MATCHING
    assert (node.PRESET, node.REFRESH_PERIODS) == ("", [10010])
    assert (node.FACTORS, node.TRACK_IMAGES) == ([8e4, 4e4, 2e4, 1e4], 20480)


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
        ({"DISTILL__CHANNEL_MATCHING__PRESET": "nobodys"}, r"DISTILL\.CHANNEL_MATCHING\.PRESET is 'nobodys'"),
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
    path = write_config(**changes, DISTILL__CHANNEL_MATCHING__PRESET="cub200_r50_mobilenet_v2", **teacher)
    cfg = load_config(str(path), ["DISTILL.CHANNEL_MATCHING.TAPS", ["res3.pre_relu", "res4.pre_relu", "res5.pre_relu"]])
    register_datasets(cfg)
    trainer = DistillTrainer(cfg)
    assert trainer.cfg.SOLVER.IMS_PER_BATCH == 2
    assert trainer.distilled.distillers["ChannelMatching"].schedule.periods == (4 * 94,)
