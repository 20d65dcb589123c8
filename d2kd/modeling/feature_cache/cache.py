"""The cache of one teacher: looks entries up, makes them, and writes them beside the training."""

import json
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2kd.errors import ConfigError
from d2kd.files import write_json
from detectron2.config import CfgNode

from ..padding import Padding, Size
from ..teacher import Teacher
from .encoding import Entry, encode, read_entry
from .identity import blank_key, collection_name, describe_collection, image_key
from .store import ABOUT, FeatureStore

logger = logging.getLogger(__name__)

#: What a loader's processes put into the dict of an image for the cached pass: a `Found`.
FOUND = "teacher_features"
#: Entries that wait for the disk; the training waits with more.
_WAITING = 16
GB = 10**9


class Found(NamedTuple):
    """What was found for an image of a batch."""

    key: str
    #: Height and width that the teacher's image is padded to, in pixels.
    canvas: Size
    entry: Entry | None


class FeatureReader:
    """Finds the entries of a batch: a part that needs no teacher, so that the loader's processes do it."""

    def __init__(self, store: FeatureStore, collection: str, padding: Padding, alone: bool) -> None:
        """
        Args:
            store: where entries lie.
            collection: the teacher's.
            padding: of the teacher.
            alone: whether the teacher sees each image alone, and not its batch.
        """
        self.store = store
        self.collection = collection
        self.padding = padding
        self.alone = alone

    def __call__(self, images: Sequence[Tensor]) -> list[Found]:
        """Returns what there is for the images of a batch, (C, H, W) each, on the CPU."""
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        found = []
        for image, size in zip(images, sizes):
            together = [size] if self.alone else sizes
            canvas = self.padding.canvas(together)
            key = image_key(image, canvas, len(together), self.collection)
            found.append(Found(key, canvas, self.find(key)))
        return found

    def find(self, key: str) -> Entry | None:
        """Returns an entry, None where there is none."""
        return self.store.read(self.collection, key)


class Prefetch:
    """What a loader calls with each batch, where it is read (`ResumableLoader.prefetch`)."""

    def __init__(self, reader: FeatureReader, accumulate: int = 1, every: int = 1) -> None:
        """
        Args:
            reader: finds entries.
            accumulate: batches of an iteration.
            every: features of every n-th iteration are needed only.
        """
        self.reader = reader
        self.accumulate = accumulate
        self.every = every

    def __call__(self, number: int, batch: Sequence[dict[str, Any]]) -> None:
        """Puts what is found for a batch, counted from the run's first one, into its images' dicts."""
        if number // self.accumulate % self.every == 0:
            for inputs, found in zip(batch, self.reader([x["image"] for x in batch])):
                inputs[FOUND] = found


class FeatureCache:
    """Entries of a teacher in a folder that other runs, and other teachers, may share.

    Attributes:
        reader: finds entries.
        hits, misses: images that were asked for so far.
        unkept: why the last entry that is not on the disk could not be written; "" where all were.
    """

    def __init__(
        self, folder: str, described: Mapping[str, Any], padding: Padding, *, dtype: str, alone: bool, max_bytes: int
    ) -> None:
        """
        Args:
            folder: of the store.
            described: what the features depend on, see `describe_collection`.
            padding: of the teacher.
            dtype: of `DTYPES`.
            alone: whether the teacher sees each image alone, and not its batch.
            max_bytes: of the whole store.
        """
        self.described = dict(described)
        self.collection = collection_name(self.described)
        self.dtype = dtype
        self.store = FeatureStore(folder, max_bytes)
        self.reader = FeatureReader(self.store, self.collection, padding, alone)
        self.hits = self.misses = 0
        self.unkept = ""
        self._writer: ThreadPoolExecutor | None = None
        self._room = threading.Semaphore(_WAITING)
        self._pending: set[Future[None]] = set()
        self._started = self._gave_up = self._told_of_size = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "FeatureCache":
        return self  # a folder on the disk: there is one of it

    @classmethod
    def from_config(cls, cfg: CfgNode, teacher: Teacher, taps: Sequence[str]) -> "FeatureCache":
        """Returns the cache that `DISTILL.CACHE` describes; nothing is written yet."""
        node = cfg.DISTILL.CACHE
        return cls(
            node.DIR,
            describe_collection(cfg, teacher, taps),
            Padding.of(teacher.model),
            dtype=node.DTYPE,
            alone=node.RUN == "image",
            max_bytes=int(node.MAX_GB * GB),
        )

    def find(self, batch: Sequence[Mapping[str, Any]]) -> list[Found]:
        """Returns what there is for a batch in Detectron2's format, which a loader may have looked for already."""
        if all(FOUND in inputs for inputs in batch):
            return [inputs[FOUND] for inputs in batch]
        return self.reader([inputs["image"].cpu() for inputs in batch])

    def blank(self, canvas: Size) -> Found:
        """Returns what there is for a canvas without an image."""
        key = blank_key(canvas, self.collection)
        return Found(key, canvas, self.reader.find(key))

    def keep(self, key: str, features: Mapping[str, Tensor]) -> Entry | None:
        """Has the features of an image written, and returns them as they will be read.

        None where they cannot be kept, as they are not finite.

        Raises:
            ConfigError: see `start`.
        """
        self.start()
        try:
            content = encode(features, self.dtype, key)
        except ValueError as error:
            logger.warning("%s: they are not kept in %s.", error, self.store.folder)
            return None
        if not self._gave_up:
            self._room.acquire()
            self._writer = self._writer or ThreadPoolExecutor(1, "feature-cache")
            written = self._writer.submit(self._write, key, content)
            self._pending.add(written)
            written.add_done_callback(self._done)
        return read_entry(torch.frombuffer(bytearray(content), dtype=torch.uint8), key)

    def flush(self) -> None:
        """Waits until all entries are written."""
        for written in list(self._pending):
            written.result()

    def _done(self, written: "Future[None]") -> None:
        self._pending.discard(written)
        self._room.release()

    def _write(self, key: str, content: bytes) -> None:
        if self._gave_up:
            return
        try:
            kept = self.store.write(self.collection, key, content)
        except OSError as error:
            self._gave_up, self.unkept = True, str(error.strerror or error)
            logger.warning(
                "DISTILL.CACHE.DIR %s: %s. Nothing more is written there; what is there is read, and for all else the "
                "teacher runs.",
                self.store.folder,
                self.unkept,
            )
            return
        if not kept:
            self.unkept = f"one takes {len(content) / 1e6:.2f} MB, more than DISTILL.CACHE.MAX_GB"
        if not self._told_of_size:
            self._told_of_size = True
            fits = self.store.max_bytes // len(content)
            logger.info(
                "Cache of the teacher's features: an image takes %.2f MB, so %s of them fit in DISTILL.CACHE.MAX_GB%s",
                len(content) / 1e6,
                f"{fits:,}",
                "." if kept else ", that is none: the teacher runs.",
            )

    def start(self) -> None:
        """Writes what the collection is of, once: a folder that takes nothing is known before a training.

        Raises:
            ConfigError: the folder cannot be written.
        """
        if self._started:
            return
        require_folder(self.store.folder)
        try:
            write_json(self.store.folder / self.collection / ABOUT, self.described)
        except OSError as error:
            raise _no_folder(self.store.folder, error.strerror or str(error)) from error
        self._started = True


def require_folder(folder: str | Path) -> None:
    """Looks at where a cache would lie, and writes nothing.

    Raises:
        ConfigError: it cannot be written.
    """
    there = Path(folder).absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise _no_folder(folder, f"{there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise _no_folder(folder, f"{there} is read only")


def _no_folder(folder: str | Path, why: str) -> ConfigError:
    return ConfigError(
        f"DISTILL.CACHE.DIR is {str(folder)!r}, which cannot be written ({why}): name another folder, or "
        '"" to let the teacher run.'
    )


def read_about(folder: Path) -> dict[str, Any]:
    """Returns what a collection's features depend on; {} where that cannot be read."""
    try:
        content = json.loads((folder / ABOUT).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
