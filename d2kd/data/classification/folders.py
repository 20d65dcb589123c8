"""Datasets of one folder a class; the names of the folders, sorted, are the classes."""

import logging
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..coco import short
from ..folders import IMAGE_SUFFIXES, is_folder, leads_back
from .source import ClassificationSource, Records

logger = logging.getLogger(__name__)

#: Names of folders that hold a part of a dataset, and are no class of it.
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
#: Names of one and the same part.
_VALIDATION = ("val", "valid", "validation")


@dataclass
class Listing:
    """What lies in a folder. Paths are relative to it."""

    root: str
    #: Images of each class, those in folders below it included; sorted, as the classes are.
    classes: dict[str, list[str]] = field(default_factory=dict)
    #: Classes whose images all lie in folders below them, and those folders.
    nested: dict[str, list[str]] = field(default_factory=dict)
    #: Images beside the class folders.
    stray: list[str] = field(default_factory=list)
    #: What is no image: how many, and the first.
    num_others: int = 0
    other: str = ""
    #: Links to images that are not there.
    broken: list[str] = field(default_factory=list)
    #: Numbers by which the file system knows the images, in their order; two of one number are one file.
    inodes: "array[int]" = field(default_factory=lambda: array("Q"))

    @property
    def images(self) -> list[str]:
        """All images, class by class."""
        return [image for images in self.classes.values() for image in images]


class ImageFolders(ClassificationSource):
    """A dataset of one folder a class. Hidden files, and files that are no images, are left out."""

    def __init__(self, name: str, root: str) -> None:
        """
        Args:
            name: of the dataset.
            root: holds the class folders. Where it is `val` and there is only `valid`, or the reverse, that is taken.
        """
        super().__init__(name)
        self.given = root
        self.definition = ("folders", os.path.abspath(self.root))

    @property
    def root(self) -> str:
        """The folder that is there."""
        return next(iter(same_split(self.given)), self.given) if not os.path.exists(self.given) else self.given

    def __call__(self) -> Records:
        return _records(self._sound_listing())

    def class_names(self) -> list[str]:
        try:
            with os.scandir(self.root) as entries:
                return sorted(e.name for e in entries if not e.name.startswith(".") and is_folder(e))
        except OSError as error:
            raise self._unreadable(self.root, error) from error

    def examine(self, missing_images: str) -> tuple[Records, Sequence[str]]:
        listing = self._sound_listing()
        if listing.broken:
            message = f"{len(listing.broken)} links of {listing.root} lead nowhere, first {short(listing.broken[0])}."
            if missing_images == "error":
                raise self.error(f"{message} Correct or remove them.")
            logger.warning("Dataset %r: %s They are left out.", self.name, message)
        if listing.stray:
            logger.warning(
                "Dataset %r: %d images lie beside the class folders of %s, first %s. They have no class, and are left "
                "out.",
                self.name,
                len(listing.stray),
                listing.root,
                short(listing.stray[0]),
            )
        if listing.num_others:
            logger.info(
                "Dataset %r: left out %d files that are no images, first %s",
                self.name,
                listing.num_others,
                short(listing.other),
            )
        self._tell_repeated(listing)
        return _records(listing), list(listing.classes)

    def _sound_listing(self) -> Listing:
        """What is there, if it is one folder a class."""
        listing = self._list()
        self._require_classes(listing)
        self._require_one_level(listing)
        if not listing.images:
            seen = f" There is {short(listing.other)}." if listing.other else ""
            raise self.error(
                f"the {len(listing.classes)} class folders of {listing.root} hold no images (files that end in "
                f"{', '.join(IMAGE_SUFFIXES)}).{seen}"
            )
        return listing

    def _require_classes(self, listing: Listing) -> None:
        if listing.classes:
            return
        if not listing.stray:
            raise self.error(f"{listing.root} has no folders in it, and there must be one for each class.")
        hint = (
            " These are ImageNet's, as they come: sort them into class folders, see datasets/README.md."
            if listing.stray[0].startswith("ILSVRC2012_val_")
            else ""
        )
        raise self.error(
            f"{len(listing.stray)} images lie directly in {listing.root}, first {short(listing.stray[0])}, and there "
            f"must be one folder for each class.{hint}"
        )

    def _require_one_level(self, listing: Listing) -> None:
        """A folder of splits, or one above the class folders, would be a dataset of other classes."""
        splits = [c for c, below in listing.nested.items() if c.lower() in _SPLITS and len(below) > 1]
        if not splits and len(listing.classes) == 1:
            splits = [c for c, below in listing.nested.items() if len(below) > 1]
        if splits:
            which = " or ".join(os.path.join(listing.root, split) for split in splits)
            raise self.error(
                f"{listing.root} holds no class folders, but {', '.join(splits)} with class folders in "
                f"{'it' if len(splits) == 1 else 'them'}. IMAGES must be {which}."
            )

    def _tell_repeated(self, listing: Listing) -> None:
        numbers = np.array(listing.inodes, dtype=np.uint64)
        found, first, counts = np.unique(numbers, return_index=True, return_counts=True)
        again = (counts > 1) & (found > 0)
        if not again.any():
            return
        images, number = listing.images, found[again][0]
        one, other = (os.path.join(listing.root, images[i]) for i in np.flatnonzero(numbers == number)[:2])
        if os.path.samefile(one, other):  # on another disk the same number is another file
            logger.warning(
                "Dataset %r: %d images are links to others of them, first %s, which is %s.",
                self.name,
                int((counts[again] - 1).sum()),
                other,
                one,
            )

    def _list(self) -> Listing:
        listing = Listing(self.root)
        if not os.path.isdir(listing.root):
            there = "is no folder" if os.path.exists(listing.root) else "does not exist"
            raise self.error(f"image folder {listing.root} {there}. Correct the path.")
        folders = []
        for entry in self._entries(listing.root):
            if is_folder(entry):
                folders.append(entry.name)
            elif _is_image(entry):
                listing.stray.append(entry.name)
            else:
                _note_other(listing, entry, entry.name)
        for name in sorted(folders):
            found = sorted(self._images(listing, name, (os.path.realpath(listing.root),)))
            listing.classes[name] = [path for path, _ in found]
            listing.inodes.extend(inode for _, inode in found)
            below = {path.split("/", 2)[1] for path, _ in found if path.count("/") > 1}
            if below and all(path.count("/") > 1 for path, _ in found):
                listing.nested[name] = sorted(below)
        listing.stray.sort()
        return listing

    def _images(self, listing: Listing, folder: str, above: tuple[str, ...]) -> Iterator[tuple[str, int]]:
        """Images in a folder and below it, in any order; `above` are the folders that led to it."""
        here = os.path.join(listing.root, folder)
        real = os.path.realpath(here)
        if leads_back(real, above):
            return
        for entry in self._entries(here):
            path = f"{folder}/{entry.name}"
            if is_folder(entry):
                yield from self._images(listing, path, (*above, real))
            elif _is_image(entry):
                yield path, entry.stat().st_ino if entry.is_symlink() else entry.inode()
            else:
                _note_other(listing, entry, path)

    def _entries(self, folder: str) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                yield from (entry for entry in entries if not entry.name.startswith("."))
        except OSError as error:
            raise self._unreadable(folder, error) from error

    def _unreadable(self, folder: str, error: OSError) -> Exception:
        return self.error(f"folder {folder} cannot be read ({error.strerror or error}).")


def same_split(path: str) -> list[str]:
    """Returns the folders that are there under another name of the same split: `valid` for `val`, and the reverse."""
    parent, name = os.path.split(os.path.normpath(path))
    if name not in _VALIDATION:
        return []
    return [other for n in _VALIDATION if n != name and os.path.isdir(other := os.path.join(parent, n))]


def _records(listing: Listing) -> Records:
    labels = (label for label, images in enumerate(listing.classes.values()) for _ in images)
    return [
        {"file_name": os.path.join(listing.root, image), "image_id": number, "label": label}
        for number, (image, label) in enumerate(zip(listing.images, labels), 1)
    ]


def _is_image(entry: os.DirEntry[str]) -> bool:
    if not entry.name.lower().endswith(IMAGE_SUFFIXES):
        return False
    return entry.is_file() if not entry.is_symlink() else os.path.isfile(entry.path)  # False for a link to itself


def _note_other(listing: Listing, entry: os.DirEntry[str], path: str) -> None:
    if entry.is_symlink() and not os.path.exists(entry.path) and entry.name.lower().endswith(IMAGE_SUFFIXES):
        listing.broken.append(path)
        return
    listing.num_others += 1
    listing.other = listing.other or path
