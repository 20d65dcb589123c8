"""Dataset wrappers: compact storage, lazy mapping, iteration, and batches of similar aspect ratio."""

import copy
import itertools
import logging
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch.utils.data as data
from torch.utils.data.sampler import Sampler

__all__ = ["AspectRatioGroupedDataset", "DatasetFromList", "MapDataset", "ToIterableDataset"]
__all__ += ["set_default_dataset_from_list_serialize_method"]

logger = logging.getLogger(__name__)


SerializeMethod = Callable[[Sequence[Any]], Sequence[Any]]


class DatasetFromList(data.Dataset):
    """A list as a dataset.

    By default its elements are pickled into one buffer. Forked workers then share that memory: a plain list
    would be copied page by page, as reading a Python object writes its reference count.
    """

    def __init__(self, lst: Sequence[Any], copy: bool = True, serialize: bool | SerializeMethod = True) -> None:
        """
        Args:
            lst: the elements.
            copy: return copies of the elements (always so when they are serialized).
            serialize: keep the elements pickled; or what makes of the list another that is kept in its place.
        """
        method = _default_serialize if serialize is True else serialize
        self._copy = copy and not method
        self._lst = method(lst) if method else lst

    def __len__(self) -> int:
        return len(self._lst)

    def __getitem__(self, idx: int) -> Any:
        item = self._lst[idx]
        return copy.deepcopy(item) if self._copy else item


class _PickledList:
    """A list whose elements are stored pickled in one numpy buffer."""

    def __init__(self, lst: Sequence[Any]) -> None:
        buffer = bytearray()
        ends = np.zeros(len(lst) + 1, dtype=np.int64)
        for i, item in enumerate(lst):
            buffer += pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL)
            ends[i + 1] = len(buffer)
        self._buffer = np.frombuffer(buffer, dtype=np.uint8)
        self._ends = ends
        logger.info("Serialized a dataset of %d elements to %.2f MiB", len(lst), len(buffer) / 2**20)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, idx: int) -> Any:
        n = len(self)
        if not -n <= idx < n:
            raise IndexError(f"index {idx} is out of range for a dataset of {n} elements")
        idx = idx % n
        return pickle.loads(memoryview(self._buffer[self._ends[idx] : self._ends[idx + 1]]))


_default_serialize: SerializeMethod | bool = _PickledList


@contextmanager
def set_default_dataset_from_list_serialize_method(func: SerializeMethod | bool) -> Iterator[None]:
    """Within it, `DatasetFromList(serialize=True)` keeps what `func` makes of a list; its elements if `func` is False.

    Args:
        func: takes a list, returns an object with its length and elements, such as one in shared memory.
    """
    global _default_serialize
    before = _default_serialize
    _default_serialize = _PickledList if func is True else func
    try:
        yield
    finally:
        _default_serialize = before


class MapDataset(data.Dataset):
    """Applies a function to the elements of a dataset.

    Where the function returns None the element is bad: a map-style dataset then gives the next good element
    in its place, an iterable one leaves it out.
    """

    def __new__(cls, dataset: data.Dataset, map_func: Callable[[Any], Any]) -> Any:
        if isinstance(dataset, data.IterableDataset):
            return _MapIterableDataset(dataset, map_func)
        return super().__new__(cls)

    def __getnewargs__(self) -> tuple[data.Dataset, Callable[[Any], Any]]:
        return self._dataset, self._map_func

    def __init__(self, dataset: data.Dataset, map_func: Callable[[Any], Any]) -> None:
        """
        Args:
            dataset: map-style or iterable.
            map_func: takes an element, returns the new one or None.
        """
        self._dataset = dataset
        self._map_func = _PicklableFunction(map_func)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, idx: int) -> Any:
        size = len(self._dataset)
        first = int(idx)
        # The fallback depends on the index alone: a run gives the same data with any number of workers.
        for tried in range(max(size, 1)):
            index = first if tried == 0 else (first + tried) % size
            item = self._map_func(self._dataset[index])
            if item is not None:
                return item
            if tried == 2:
                logger.warning("Three consecutive elements, from index %d on, gave None; trying further ones", first)
        raise RuntimeError(f"the map function returned None for each of the {size} elements of the dataset")


class _MapIterableDataset(data.IterableDataset):
    """`MapDataset` of an iterable dataset."""

    def __init__(self, dataset: Iterable[Any], map_func: Callable[[Any], Any]) -> None:
        self._dataset = dataset
        self._map_func = _PicklableFunction(map_func)

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Any]:
        for item in map(self._map_func, self._dataset):
            if item is not None:
                yield item


class _PicklableFunction:
    """A function that also pickles when it is a lambda or a closure, for workers that are not forked."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function._function if isinstance(function, _PicklableFunction) else function

    def __call__(self, item: Any) -> Any:
        return self._function(item)

    def __reduce__(self) -> tuple[Callable, tuple[bytes]]:
        import cloudpickle

        return _unpickle_function, (cloudpickle.dumps(self._function),)


def _unpickle_function(dumped: bytes) -> _PicklableFunction:
    return _PicklableFunction(pickle.loads(dumped))


class ToIterableDataset(data.IterableDataset):
    """A map-style dataset in the order of a sampler, as an iterable."""

    def __init__(
        self,
        dataset: data.Dataset,
        sampler: Sampler | Iterable[int],
        shard_sampler: bool = True,
        shard_chunk_size: int = 1,
    ) -> None:
        """
        Args:
            dataset: map-style.
            sampler: gives indices.
            shard_sampler: each loader worker takes its share of the indices; False if the sampler does that.
            shard_chunk_size: the workers take turns at this many indices. With the loader's batch size
                the batches are those of a loader without workers.
        """
        assert not isinstance(dataset, data.IterableDataset), "the dataset is iterable already"
        self.dataset = dataset
        self.sampler = sampler
        self.shard_sampler = shard_sampler
        self.shard_chunk_size = shard_chunk_size

    def __iter__(self) -> Iterator[Any]:
        worker = data.get_worker_info()
        indices = iter(self.sampler)
        if self.shard_sampler and worker is not None and worker.num_workers > 1:
            indices = _every_nth_chunk(indices, worker.id, worker.num_workers, self.shard_chunk_size)
        for idx in indices:
            yield self.dataset[idx]

    def __len__(self) -> int:
        return len(self.sampler)


def _every_nth_chunk(items: Iterator[Any], start: int, step: int, size: int) -> Iterator[Any]:
    """The chunks number start, start + step, ... of `size` items each."""
    for chunk in itertools.count():
        taken = list(itertools.islice(items, size))
        if not taken:
            return
        if chunk % step == start:
            yield from taken


class AspectRatioGroupedDataset(data.IterableDataset):
    """Batches of images that are all wide or all not, to pad less. Incomplete batches at the end are dropped."""

    def __init__(self, dataset: Iterable[dict], batch_size: int) -> None:
        """
        Args:
            dataset: gives dicts with "width" and "height".
            batch_size: images per batch.
        """
        self.dataset = dataset
        self.batch_size = batch_size
        self._buckets: list[list[dict]] = [[], []]

    def __iter__(self) -> Iterator[list[dict]]:
        for item in self.dataset:
            bucket = self._buckets[0 if item["width"] > item["height"] else 1]
            bucket.append(item)
            if len(bucket) == self.batch_size:
                batch = bucket[:]
                # Before the yield, because the consumer may stop here and iterate again later.
                bucket.clear()
                yield batch
