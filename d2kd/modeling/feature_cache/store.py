"""A folder of entries, each a file of its own: checked when read, and the least recently used go first.

Files in the format of safetensors, moved into place when they are complete, and nothing else: the folder may lie on a
disk of a network; a process that is killed leaves a file under a temporary name; a file that a disk has damaged is one
lost entry. (A database in one file, such as LMDB, is mapped into memory: a truncated one ends the process, networks'
file systems are ruled out, and room that large values leave is hard to use again.)
"""

import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock

from d2kd.files import replacing

from .encoding import DamagedEntryError, Entry, read_entry

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
#: What a collection is of.
ABOUT = "about.json"
#: Seconds after which a file under a temporary name is that of a process that was killed.
_ABANDONED = 3600.0
#: Seconds for which the time of the last use need not be renewed.
FRESH = 60.0
#: Share of the bound that is left free where entries had to go, so that not every one that comes needs a look at all.
_ROOM = 0.05
#: Seconds after which another process that holds the lock is taken for stuck.
_PATIENCE = 60.0


class StoredFile(NamedTuple):
    """An entry on the disk."""

    path: Path
    size: int
    used: float


class FeatureStore:
    """Entries of any number of teachers ("collections", folders below the store's), under one bound on their size.

    Any number of processes and runs may read and write at once. What is written is counted in a file of the store,
    under a lock; what the count has missed (processes that were killed) is mended whenever entries are removed.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        """
        Args:
            folder: made with the first entry.
            max_bytes: of all entries together.
        """
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        #: entries that were damaged, and removed, in this process
        self.damaged = 0
        #: the latest time of use, in seconds since 1970, of entries that this process has removed to make room
        self.newest_removed = 0.0
        self._told_of_room = False

    def path(self, collection: str, key: str) -> Path:
        """Returns the file of an entry; 256 folders keep each of them short."""
        return self.folder / collection / key[:2] / f"{key}{SUFFIX}"

    def read(self, collection: str, key: str) -> Entry | None:
        """Returns an entry; None where there is none, or none that is whole: a damaged one is removed."""
        path = self.path(collection, key)
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                data = torch.empty(status.st_size, dtype=torch.uint8)
                count = file.readinto(data.numpy().data)
            entry = read_entry(data[:count], key)
        except DamagedEntryError as error:
            self.damaged += 1
            logger.warning("%s is damaged (%s): it is removed, and the teacher runs.", path, error)
            path.unlink(missing_ok=True)
            return None
        except OSError:
            return None
        if time.time() - status.st_mtime > FRESH:
            try:
                os.utime(path)
            except OSError:
                pass  # removed meanwhile, or a folder that is read only
        return entry

    def write(self, collection: str, key: str, content: bytes) -> bool:
        """Keeps an entry, and removes others where there is no room; returns whether it is there now.

        Raises:
            OSError: it cannot be written: a full disk, a folder that is read only, a lock that nobody gives up.
        """
        path = self.path(collection, key)
        if path.exists():
            return True
        if len(content) > self.max_bytes:
            return False
        self._reserve(len(content))
        try:
            with replacing(path) as temporary:
                temporary.write_bytes(content)
        except OSError:
            self._reserve(-len(content))
            raise
        return True

    def entries(self, collection: str = "") -> Iterator[StoredFile]:
        """Yields all entries, or those of one collection, in no order."""
        roots = [self.folder / collection] if collection else self.collections()
        for root in roots:
            for shard in _folders(root):
                yield from _files(shard)

    def collections(self) -> list[Path]:
        """Returns the folders of all collections: those that say what they hold."""
        return sorted(folder for folder in _folders(self.folder) if (folder / ABOUT).is_file())

    def clear(self, collection: str = "") -> tuple[int, int]:
        """Removes all entries, or a collection; returns how many there were, and their bytes.

        Raises:
            OSError: something cannot be removed.
        """
        count = size = 0
        with self._lock():
            for root in [self.folder / collection] if collection else self.collections():
                for entry in self.entries(root.name):
                    count, size = count + 1, size + entry.size
                shutil.rmtree(root)
            self._count(sum(entry.size for entry in self.entries()))
        return count, size

    # ---- the bound ----

    def _reserve(self, size: int) -> None:
        """Counts bytes that are about to be written, and makes room for them; negative ones were not written."""
        with self._lock():
            used = self._counted()
            if used is None or used + size > self.max_bytes:
                used = self._make_room(size)
            self._count(used + size)

    def _make_room(self, size: int) -> int:
        """Removes entries, least recently used first, where more than the bound would be there; returns what is."""
        found = sorted(self.entries(), key=lambda entry: entry.used)
        used = sum(entry.size for entry in found)
        if used + size <= self.max_bytes:
            return used
        target = min(self.max_bytes - size, int(self.max_bytes * (1 - _ROOM)))
        removed = 0
        for entry in found:
            if used <= target:
                break
            entry.path.unlink(missing_ok=True)
            self.newest_removed = max(self.newest_removed, entry.used)
            used, removed = used - entry.size, removed + 1
        if self._told_of_room:
            logger.info("%s: %d entries made room, those that were used least recently.", self.folder, removed)
        else:
            self._told_of_room = True
            logger.warning(
                "%s has reached DISTILL.CACHE.MAX_GB: %d entries made room, those that were used least recently. A "
                "training that goes through more than fits finds none of them again: raise MAX_GB, or set "
                "DISTILL.CACHE.DTYPE to float16 or int8.",
                self.folder,
                removed,
            )
        return used

    def _lock(self) -> FileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / ".lock", timeout=_PATIENCE)

    @property
    def _counter(self) -> Path:
        return self.folder / ".bytes"

    def _counted(self) -> int | None:
        try:
            return int(self._counter.read_text())
        except (OSError, ValueError):
            return None

    def _count(self, size: int) -> None:
        self._counter.write_text(str(size))


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as found:
            return [Path(item.path) for item in found if item.is_dir() and not item.name.startswith(".")]
    except OSError:
        return []


def _files(folder: Path) -> list[StoredFile]:
    """The entries of a folder; what killed processes have left there is removed."""
    entries = []
    try:
        with os.scandir(folder) as found:
            for item in found:
                status = item.stat()
                if not item.name.startswith("."):
                    entries.append(StoredFile(Path(item.path), status.st_size, status.st_mtime))
                elif time.time() - status.st_mtime > _ABANDONED:
                    Path(item.path).unlink(missing_ok=True)
    except OSError:
        pass  # removed meanwhile
    return entries
