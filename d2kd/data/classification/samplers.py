"""Repeated augmentation: an image comes several times in a row, each time augmented anew, on different processes."""

import itertools
from collections.abc import Iterator
from typing import Any

from torch.utils.data import Sampler

from d2kd.rng import derive_seed
from detectron2.utils import comm


class RepeatAugmentation(Sampler[int]):
    """timm's `RepeatAugSampler`, epoch after epoch without an end; each epoch ends after a share of the repetitions."""

    def __init__(self, size: int, repeats: int, seed: int) -> None:
        """
        Args:
            size: images of the dataset.
            repeats: how many times in a row an image comes.
            seed: decides the order of all epochs; the same on all processes.
        """
        self.seed = seed
        self._sampler = _epoch_sampler(size, repeats, comm.get_world_size(), comm.get_rank())

    def __iter__(self) -> Iterator[int]:
        for epoch in itertools.count():
            self._sampler.set_epoch(derive_seed(self.seed, epoch))
            yield from self._sampler


def repeated_length(size: int, repeats: int) -> int:
    """Returns how many images an epoch has, on all processes: timm makes of larger numbers a multiple of 256."""
    return len(_epoch_sampler(size, repeats, 1, 0))


def _epoch_sampler(size: int, repeats: int, processes: int, process: int) -> Any:
    from timm.data.distributed_sampler import RepeatAugSampler  # slow, and of no use to detectors

    return RepeatAugSampler(range(size), num_replicas=processes, rank=process, num_repeats=repeats)
