"""The training loader: every batch depends on seed, process and number alone."""

import itertools

import numpy as np
import pytest
import torch

from d2kd.data.loader import ResumableLoader, _sampler_builder
from d2kd.errors import ConfigError
from detectron2.config import get_cfg
from detectron2.data.samplers import TrainingSampler

RECORDS = [{"id": i, "width": 10 + 5 * (i % 3 == 0), "height": 12} for i in range(11)]


def mapper(record):
    return {**record, "noise": float(np.random.rand()), "torch": float(torch.rand(())), "wide": record["width"] > 12}


def batches(count, **changes):
    start = changes.pop("start", 0)
    arguments = {"batch_size": 3, "seed": 5, **changes}
    loader = ResumableLoader(RECORDS, mapper, lambda seed: TrainingSampler(len(RECORDS), seed=seed), **arguments)
    loader.start = start
    return list(itertools.islice(iter(loader), count))


@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_later_start_continues_the_same_stream_with_any_number_of_workers(grouping, workers):
    whole = batches(8, aspect_ratio_grouping=grouping)
    assert batches(5, aspect_ratio_grouping=grouping, num_workers=workers, start=3) == whole[3:]


def test_batches_hold_images_of_one_orientation_and_all_images_come():
    stream = batches(40)
    assert all(len({x["wide"] for x in batch}) == 1 for batch in stream)
    assert {x["id"] for batch in stream for x in batch} == set(range(11))


def test_an_image_is_augmented_anew_each_time_it_comes():
    seen = [x for batch in batches(20) for x in batch if x["id"] == 4]
    assert len(seen) > 3 and len({x["noise"] for x in seen}) == len(seen) == len({x["torch"] for x in seen})


def test_another_seed_gives_another_stream():
    loader = ResumableLoader(RECORDS, mapper, lambda seed: TrainingSampler(11, seed=seed), batch_size=3, seed=6)
    assert [x["id"] for x in next(iter(loader))] != [x["id"] for x in batches(1)[0]]


def test_reading_in_this_process_leaves_the_random_states_alone():
    np.random.seed(1)
    torch.manual_seed(1)
    want = np.random.rand(), torch.rand(()).item()
    np.random.seed(1)
    torch.manual_seed(1)
    batches(4)
    assert (np.random.rand(), torch.rand(()).item()) == want


def test_repeat_factors_show_rare_classes_more_often():
    cfg = get_cfg()
    cfg.merge_from_list(["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD", 0.9])
    dicts = [{"annotations": [{"category_id": int(i == 0)}]} for i in range(10)]
    drawn = list(itertools.islice(_sampler_builder(cfg, dicts)(3), 300))
    assert drawn.count(0) > 2 * max(drawn.count(i) for i in range(1, 10))
    assert drawn == list(itertools.islice(_sampler_builder(cfg, dicts)(3), 300))


def test_an_unknown_sampler_is_an_error():
    cfg = get_cfg()
    cfg.DATALOADER.SAMPLER_TRAIN = "Shuffle"
    with pytest.raises(ConfigError, match=r"DATALOADER\.SAMPLER_TRAIN is 'Shuffle'"):
        _sampler_builder(cfg, [])
