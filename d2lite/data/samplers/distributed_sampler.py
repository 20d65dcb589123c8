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

__all__ = ["InferenceSampler", "RandomSubsetTrainingSampler", "RepeatFactorTrainingSampler", "TrainingSampler"]

logger = logging.getLogger(__name__)


class _EndlessSampler(Sampler):
    """Yields this process's share of an endless stream of indices, the same stream in all processes."""

    def _start(self, seed: int | None, shuffle: bool) -> None:
        self._seed = _shared_seed(seed)
        self._shuffle = shuffle
        # Asked for here: the worker processes of a data loader, which may iterate this, are in no process group.
        self._share = (comm.get_rank(), None, comm.get_world_size())

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(self._infinite_indices(), *self._share)

    def _infinite_indices(self) -> Iterator[int]:
        """The whole stream: one epoch after the other."""
        generator = torch.Generator().manual_seed(self._seed)
        while True:
            epoch = self._epoch(generator)
            if self._shuffle:
                epoch = epoch[torch.randperm(len(epoch), generator=generator)]
            yield from epoch.tolist()

    def _epoch(self, generator: torch.Generator) -> torch.Tensor:
        """The indices of one epoch, not shuffled."""
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
        self._indices = torch.arange(size)
        self._start(seed, shuffle)

    def _epoch(self, generator: torch.Generator) -> torch.Tensor:
        return self._indices


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
        super().__init__(size, shuffle, seed_shuffle)
        assert 0.0 < subset_ratio <= 1.0, f"subset_ratio must be in (0, 1], got {subset_ratio}"
        kept = int(size * subset_ratio)
        assert kept > 0, f"subset_ratio {subset_ratio} of {size} images leaves none"
        generator = torch.Generator().manual_seed(_shared_seed(seed_subset))
        self._indices = torch.randperm(size, generator=generator)[:kept]
        logger.info("Training on %d of %d images (subset_ratio %s)", kept, size, subset_ratio)


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
        self._factors = repeat_factors
        self._start(seed, shuffle)

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

    def _epoch(self, generator: torch.Generator) -> torch.Tensor:
        """In the order of the dataset, with the fractions rounded at random."""
        once_more = torch.rand(len(self._factors), generator=generator) < self._factors.frac()
        return torch.arange(len(once_more)).repeat_interleave(self._factors.long() + once_more)


class InferenceSampler(Sampler):
    """Every image once; each process gets a contiguous part, the first ones at most one image more."""

    def __init__(self, size: int) -> None:
        """
        Args:
            size: length of the dataset.
        """
        assert size > 0, "nothing to run on: the dataset is empty"
        rank = comm.get_rank()
        share, rest = divmod(size, comm.get_world_size())
        begin = share * rank + min(rank, rest)
        self._part = range(begin, begin + share + (rank < rest))

    def __iter__(self) -> Iterator[int]:
        return iter(self._part)

    def __len__(self) -> int:
        return len(self._part)


def _shared_seed(seed: int | None) -> int:
    return int(comm.shared_random_seed() if seed is None else seed)
