"""A batch sampler whose batches hold elements of one group."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data.sampler import BatchSampler, Sampler

__all__ = ["GroupedBatchSampler"]


class GroupedBatchSampler(BatchSampler):
    """Collects the indices of a sampler by group, and yields a batch whenever a group is full."""

    def __init__(self, sampler: Sampler, group_ids: Sequence[int], batch_size: int) -> None:
        """
        Args:
            sampler: gives indices.
            group_ids: the group of each index.
            batch_size: number of indices per batch; incomplete batches at the end are dropped.

        Raises:
            ValueError: if `sampler` is not a torch Sampler.
        """
        if not isinstance(sampler, Sampler):
            raise ValueError(f"sampler must be a torch.utils.data.Sampler, got {type(sampler).__name__}")
        self.sampler = sampler
        self.group_ids = np.asarray(group_ids)
        assert self.group_ids.ndim == 1, f"group_ids must have one dimension, got {self.group_ids.shape}"
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        groups = {group: [] for group in np.unique(self.group_ids).tolist()}
        for index in self.sampler:
            group = int(self.group_ids[index])
            groups[group].append(index)
            if len(groups[group]) == self.batch_size:
                batch, groups[group] = groups[group], []
                yield batch

    def __len__(self) -> int:
        raise NotImplementedError("the number of batches depends on the order of the groups")
