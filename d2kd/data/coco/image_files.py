"""Where the images of a COCO file are: file names as other systems write them are understood."""

import logging
import os
import unicodedata
from collections.abc import Iterator
from urllib.parse import unquote

from detectron2.utils.file_io import PathManager

from ..images import image_problem
from .reading import CocoFile, DatasetError, Entries, id_of, short

#: Images of a dataset whose first bytes are looked at before training; what is wrong with others is told when they are
#: read.
MAX_IMAGES_SEEN = 5000

logger = logging.getLogger(__name__)


def find_image_files(file: CocoFile, image_root: str) -> Entries:
    """Gives every listed image the name of its file, and returns the images that have none.

    Names with backslashes or escapes (%20), or in another form of Unicode, become those of files that are there.

    Raises:
        DatasetError: there is no such folder.
    """
    if not PathManager.isdir(image_root):
        raise DatasetError(f"Image folder {image_root} (for {file.path}) does not exist. Correct the path.")
    folders: dict[str, set[str]] = {}

    def is_there(name: str) -> bool:
        folder, _, base = name.rpartition("/")
        if folder not in folders:  # listing a folder once is much faster than asking for each file
            full = os.path.join(image_root, folder or ("/" if name.startswith("/") else ""))
            folders[folder] = set(PathManager.ls(full)) if PathManager.isdir(full) else set()
        return base in folders[folder]

    missing, renamed = [], []
    for image in file.images:
        name = image["file_name"]
        found = next((other for other in _spellings(name) if is_there(other)), None)
        if found is None:
            missing.append(image)
        elif found != name:
            renamed.append((name, found))
            image["file_name"] = found
    if renamed:
        logger.info(
            "%s: %d file names are written otherwise than the files, first %s for %s",
            file.path,
            len(renamed),
            *map(short, renamed[0]),
        )
    return missing


def check_image_files(file: CocoFile, image_root: str, policy: str) -> None:
    """Every listed image must be in the image folder; with the policy "warn" those that are not are named."""
    missing = find_image_files(file, image_root)
    _look_at_images(file, image_root, policy, {id(image) for image in missing})
    if not missing:
        return
    name = missing[0]["file_name"]
    message = (
        f"{len(missing)} of the {len(file.images)} images that {file.path} lists are not in {image_root}, first "
        f"{short(name)}{id_of(missing[0])}.{_hint(name, image_root)}"
    )
    if policy == "error":
        raise DatasetError(f"{message} Correct the image folder, or complete it.")
    logger.warning("%s They are left out.", message)


def _look_at_images(file: CocoFile, image_root: str, policy: str, missing: set[int]) -> None:
    """Opens images, evenly spread over the dataset, to find before training what holds for many of them."""
    there = [image for image in file.images if id(image) not in missing]
    step = max(1, -(-len(there) // MAX_IMAGES_SEEN))
    for image in there[::step]:
        problem = image_problem(os.path.join(image_root, image["file_name"]), (image["width"], image["height"]))
        if problem and policy == "error":
            raise DatasetError(f"{problem} Repair it, or remove it from {file.path}.")
        if problem:
            logger.warning("%s It is left out, as others may be.", problem)
            return


def _spellings(name: str) -> Iterator[str]:
    yield name
    slashes = name.replace("\\", "/")
    for text in (slashes, unquote(slashes)):
        yield text
        for form in ("NFC", "NFD"):
            yield unicodedata.normalize(form, text)


def _hint(name: str, image_root: str) -> str:
    """What is there instead: the same name without folders, or in other letters."""
    base = name.replace("\\", "/").rpartition("/")[2]
    here = PathManager.ls(image_root)
    if base != name and base in here:
        return f" There is {short(base)}: file_name must be relative to that folder."
    stem = os.path.splitext(base)[0].lower()
    similar = next((other for other in here if os.path.splitext(other)[0].lower() == stem), None)
    return f" There is {short(similar)}." if similar else ""
