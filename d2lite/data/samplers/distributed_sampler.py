"""Endless training samplers, and the sampler that visits every image once for inference.

In training all processes draw the same endless stream of indices from the same seed, and process r of W takes
the elements r, r + W, r + 2W, ... of it.
"""

import itertools
import logging
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data.sampler import Sampler

from d2lite.utils import comm

__all__ = [
    "TrainingSampler",
    "RandomSubsetTrainingSampler",
    "RepeatFactorTrainingSampler",
    "InferenceSampler",
]

logger = logging.getLogger(__name__)


class _EndlessSampler(Sampler):
    """Yields this process's share of an endless stream of indices, the same stream in all processes."""

    def _start(self, seed: int | None) -> None:
        self._seed = _shared_seed(seed)
        self._rank = comm.get_rank()
        self._world_size = comm.get_world_size()

    def __iter__(self) -> Iterator[int]:
        yield from itertools.islice(self._infinite_indices(), self._rank, None, self._world_size)

    def _infinite_indices(self) -> Iterator[int]:
        """The whole stream, generated from `self._seed`."""
        raise NotImplementedError


class TrainingSampler(_EndlessSampler):
    """One random permutation of the dataset after the other, without end."""

    def __init__(self, size: int, shuffle: bool = True, seed: int | None = None) -> None:
        """
        Args:
            size: length of the dataset.
            shuffle: False keeps the order 0, 1, 2, ...
            seed: must be equal in all processes; when None the processes agree on a random one.

        Raises:
            TypeError, ValueError: if the size is not a positive integer.
        """
        if not isinstance(size, int):
            raise TypeError(f"TrainingSampler(size=) must be an int, got {type(size).__name__}")
        if size <= 0:
            raise ValueError(f"TrainingSampler(size=) must be positive, got {size}: is the dataset empty?")
        self._size = size
        self._shuffle = shuffle
        self._start(seed)

    def _infinite_indices(self) -> Iterator[int]:
        g = torch.Generator()
        g.manual_seed(self._seed)
        while True:
            yield from (torch.randperm(self._size, generator=g).tolist() if self._shuffle else range(self._size))


class RandomSubsetTrainingSampler(TrainingSampler):
    """A `TrainingSampler` on a fixed random part of the dataset."""

    def __init__(
        self,
        size: int,
        subset_ratio: float,
        shuffle: bool = True,
        seed_shuffle: int | None = None,
        seed_subset: int | None = None,
    ) -> None:
        """
        Args:
            size: length of the dataset.
            subset_ratio: share of the dataset to use, in (0, 1].
            shuffle: False keeps the sampled order of the subset.
            seed_shuffle: seed of the permutations, equal in all processes.
            seed_subset: seed of the selection of the subset, equal in all processes.
        """
        super().__init__(size=size, shuffle=shuffle, seed=seed_shuffle)
        assert 0.0 < subset_ratio <= 1.0, f"subset_ratio must be in (0, 1], got {subset_ratio}"
        self._size_subset = int(size * subset_ratio)
        assert self._size_subset > 0, f"subset_ratio {subset_ratio} of {size} images leaves none"
        g = torch.Generator()
        g.manual_seed(_shared_seed(seed_subset))
        self._indexes_subset = torch.randperm(size, generator=g)[: self._size_subset]
        logger.info("Training on %d of %d images (subset_ratio %s)", self._size_subset, size, subset_ratio)

    def _infinite_indices(self) -> Iterator[int]:
        g = torch.Generator()
        g.manual_seed(self._seed)
        while True:
            subset = self._indexes_subset
            if self._shuffle:
                subset = subset[torch.randperm(self._size_subset, generator=g)]
            yield from subset.tolist()


class RepeatFactorTrainingSampler(_EndlessSampler):
    """Repeats images of rare categories.

    Source: Gupta et al., "LVIS: A Dataset for Large Vocabulary Instance Segmentation" (2019), section 5.2.
    """

    def __init__(self, repeat_factors: torch.Tensor, *, shuffle: bool = True, seed: int | None = None) -> None:
        """
        Args:
            repeat_factors: (N,) how often each image comes per epoch; the fraction is a probability.
            shuffle: False keeps the order of the dataset.
            seed: must be equal in all processes; when None the processes agree on a random one.
        """
        self._shuffle = shuffle
        self._start(seed)
        self._int_part = torch.trunc(repeat_factors)
        self._frac_part = repeat_factors - self._int_part

    @staticmethod
    def repeat_factors_from_category_frequency(
        dataset_dicts: list[dict[str, Any]], repeat_thresh: float, sqrt: bool = True
    ) -> torch.Tensor:
        """Repeat factor of each image: that of its rarest category, max(1, sqrt(repeat_thresh / frequency)).

        Args:
            dataset_dicts: the dataset; each dict has "annotations" with "category_id".
            repeat_thresh: categories in a smaller share of the images are repeated.
            sqrt: False leaves out the square root.

        Returns:
            (N,) float32.
        """
        categories = [{a["category_id"] for a in d["annotations"]} for d in dataset_dicts]
        images_with = Counter(c for image in categories for c in image)

        def factor(count: int) -> float:
            ratio = repeat_thresh * len(dataset_dicts) / count
            return max(1.0, math.sqrt(ratio) if sqrt else ratio)

        factors = {category: factor(count) for category, count in images_with.items()}
        per_image = [max((factors[c] for c in image), default=1.0) for image in categories]
        return torch.tensor(per_image, dtype=torch.float32)

    def _get_epoch_indices(self, generator: torch.Generator) -> torch.Tensor:
        """Indices of one epoch, in the order of the dataset, with the fractions rounded at random."""
        rands = torch.rand(len(self._frac_part), generator=generator)
        counts = self._int_part + (rands < self._frac_part).float()
        return torch.repeat_interleave(torch.arange(len(counts)), counts.long())

    def _infinite_indices(self) -> Iterator[int]:
        g = torch.Generator()
        g.manual_seed(self._seed)
        while True:
            indices = self._get_epoch_indices(g)
            if self._shuffle:
                indices = indices[torch.randperm(len(indices), generator=g)]
            yield from indices.tolist()


class InferenceSampler(Sampler):
    """Every image once; each process gets a contiguous part, the first ones at most one image more."""

    def __init__(self, size: int) -> None:
        """
        Args:
            size: length of the dataset.
        """
        assert size > 0, "nothing to run on: the dataset is empty"
        self._size = size
        self._rank = comm.get_rank()
        self._world_size = comm.get_world_size()
        self._local_indices = self._get_local_indices(size, self._world_size, self._rank)

    @staticmethod
    def _get_local_indices(total_size: int, world_size: int, rank: int) -> range:
        share, rest = divmod(total_size, world_size)
        begin = share * rank + min(rank, rest)
        return range(begin, begin + share + (rank < rest))

    def __iter__(self) -> Iterator[int]:
        yield from self._local_indices

    def __len__(self) -> int:
        return len(self._local_indices)


def _shared_seed(seed: int | None) -> int:
    return int(comm.shared_random_seed() if seed is None else seed)
