"""What is to be predicted on: image files, folders and globs of them, videos, a camera."""

import glob
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from d2kd.data.folders import IMAGE_SUFFIXES, walk
from d2kd.data.images import image_problem
from d2kd.errors import UserError

logger = logging.getLogger(__name__)

#: Endings of files that are taken for videos; others are if they are no images.
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".gif")
#: Endings of images that are not taken from folders: few of them can be read.
_OTHER_IMAGES = (
    ".avif",
    ".heic",
    ".heif",
    ".jfif",
    ".jp2",
    ".tga",
    ".psd",
    ".svg",
    ".exr",
    ".dng",
    ".cr2",
    ".nef",
    ".arw",
)
#: Files that a line names.
_NAMED = 3
#: Endings of pictures that keep their name; those of other images get .png behind theirs.
_KEPT = (".png", ".jpg", ".jpeg")
_GLOB = frozenset("*?[")
#: Frames a second where a video does not tell, or tells what cannot be.
_USUAL_RATE, _LARGEST_RATE = 25.0, 1000.0


class InputError(UserError):
    """An input that is not there, or cannot be read."""


@dataclass(frozen=True)
class ImageFile:
    """An image, and its place in the folders of results: a relative path, which gives a `picture_name` of its own."""

    path: str
    name: str


@dataclass(frozen=True)
class Video:
    """A video file, or the number of a camera; `name` as that of an `ImageFile`."""

    path: str | int
    name: str

    @property
    def title(self) -> str:
        """What messages and tables call it."""
        return self.path if isinstance(self.path, str) else self.name

    def count(self) -> int | None:
        """Returns how many frames the file says it has; None where it does not, and of a camera."""
        if isinstance(self.path, int):
            return None
        number = int(self._open().get(cv2.CAP_PROP_FRAME_COUNT))
        return number if number > 0 else None

    def rate(self) -> float:
        """Returns frames a second."""
        rate = float(self._open().get(cv2.CAP_PROP_FPS)) if isinstance(self.path, str) else 0.0
        return rate if 0 < rate <= _LARGEST_RATE else _USUAL_RATE

    def frames(self) -> Iterator[np.ndarray]:
        """Yields the frames, uint8 (H, W, 3) BGR.

        Raises:
            InputError: there is none, or it cannot be opened.
        """
        capture = self._open()
        found, frame = capture.read()
        if not found:
            raise InputError(f"{self._what} gives no frame that can be decoded. {self._advice}")
        while found:
            yield frame
            found, frame = capture.read()
        capture.release()

    def _open(self) -> cv2.VideoCapture:
        if not is_utf8(self.path):
            raise InputError(f"Video {self.path!r} has a name that is not UTF-8, which OpenCV cannot open: rename it.")
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what is wrong is said here, in one line
        before = cv2.utils.logging.getLogLevel()
        cv2.utils.logging.setLogLevel(0)
        try:
            capture = cv2.VideoCapture(self.path)
        finally:
            cv2.utils.logging.setLogLevel(before)
        if not capture.isOpened():
            raise InputError(f"{self._what} cannot be opened. {self._advice}")
        return capture

    @property
    def _what(self) -> str:
        return f"Video {self.path}" if isinstance(self.path, str) else f"Camera {self.path} (--camera)"

    @property
    def _advice(self) -> str:
        if isinstance(self.path, int):
            return "Cameras are numbered from 0; is it in use by another program?"
        return "It is damaged, or of a kind that OpenCV does not decode; convert it, e.g. to MP4."


def is_utf8(path: str | int) -> bool:
    """Returns whether OpenCV can take a path: at bytes that are no UTF-8 it ends the program."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def picture_name(name: str, *, is_video: bool) -> str:
    """Returns what the picture of an input is called: its own name, with an ending that is written."""
    kept, ending = ((".mp4",), ".mp4") if is_video else (_KEPT, ".png")
    return name if name.lower().endswith(kept) else f"{name}{ending}"


def find_inputs(
    paths: Sequence[str], camera: int | None = None, without: str | None = None
) -> tuple[list[ImageFile], list[Video]]:
    """Returns images and videos, each once, in the order that they were given in, and sorted within a folder or glob.

    Args:
        paths: of images, videos, folders of images (with all folders below them), and patterns such as
            "photos/**/*.jpg". Hidden files are left out of folders, and so are videos, which the log names.
        camera: number of a camera.
        without: a folder whose files are left out, that of the results.

    Raises:
        InputError: a path is not there, a folder holds no images, or a pattern matches no file.
    """
    images: list[ImageFile] = []
    videos = [] if camera is None else [Video(camera, f"camera{camera}")]
    seen, pictures = set[str](), {picture_name(video.name, is_video=True) for video in videos}
    for given in paths:
        for path, name in _matches(given, without):
            real = os.path.realpath(path)
            if real in seen or _lies_in(path, without):
                continue
            seen.add(real)
            is_video = _is_video(path)
            name = _unused(name, pictures, is_video)
            if is_video:
                videos.append(Video(path, name))
            else:
                images.append(ImageFile(path, name))
    if not (images or videos):
        raise InputError("There is nothing to predict on: give images, folders, globs or videos, or --camera 0.")
    return images, videos


def _lies_in(path: str, folder: str | None) -> bool:
    return bool(folder) and Path(os.path.realpath(str(folder))) in Path(os.path.realpath(path)).parents


def _matches(given: str, without: str | None) -> Iterator[tuple[str, str]]:
    """The files of a path, folder or pattern, and the names of their results."""
    if os.path.isdir(given):
        everything = list(_below(given))
        found = [path for path in everything if not _lies_in(path, without)]
        files = [path for path in found if path.lower().endswith(IMAGE_SUFFIXES) or _is_still_gif(path)]
        taken = set(files)
        others = [p for p in found if p.lower().endswith((*VIDEO_SUFFIXES, *_OTHER_IMAGES)) and p not in taken]
        if not files and (others or len(found) == len(everything)):
            more = f" Give others by name, or a pattern ({_few(others)})." if others else ""
            raise InputError(f"Folder {given} holds no images ({', '.join(IMAGE_SUFFIXES)}).{more}")
        if files and others:
            logger.warning(
                "Folder %s: %d file(s) are left out (%s), as of folders images are taken: %s. Give others by name, or "
                "a pattern.",
                given,
                len(others),
                _few(others),
                ", ".join(IMAGE_SUFFIXES),
            )
        yield from ((path, os.path.relpath(path, given)) for path in files)
    elif os.path.exists(given):
        yield given, os.path.basename(given)
    elif _GLOB & set(given):
        files = sorted(path for path in glob.glob(given, recursive=True) if os.path.isfile(path))
        if not files:
            raise InputError(f"Nothing matches {given}: no such file.")
        yield from ((path, os.path.basename(path)) for path in files)
    else:
        raise InputError(f"There is no {given}: give an image, a folder, a glob or a video.")


def _few(paths: Sequence[str]) -> str:
    names = [os.path.basename(path) for path in paths[:_NAMED]]
    return ", ".join([*names, "..."] if len(paths) > _NAMED else names)


def _below(folder: str) -> Iterator[str]:
    for where, names in walk(folder):
        yield from (os.path.join(where, name) for name in names)


def _unused(name: str, pictures: set[str], is_video: bool) -> str:
    """The name, with a number where its picture is another input's too."""
    stem, ending = os.path.splitext(name)
    number = 1
    while picture_name(name, is_video=is_video) in pictures:
        number += 1
        name = f"{stem}_{number}{ending}"
    pictures.add(picture_name(name, is_video=is_video))
    return name


def _is_video(path: str) -> bool:
    suffix = os.path.splitext(path)[1].lower()
    if suffix in IMAGE_SUFFIXES or suffix in VIDEO_SUFFIXES:
        return suffix in VIDEO_SUFFIXES and not _is_still_gif(path)
    return os.path.isfile(path) and image_problem(path) is not None and _opens(path)


def _is_still_gif(path: str) -> bool:
    """Whether a file is a GIF of one image, which is no video."""
    if not path.lower().endswith(".gif"):
        return False
    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1) == 1
    except Exception:  # decoders raise all kinds of them on damaged files
        return False


def _opens(path: str) -> bool:
    try:
        Video(path, "").count()
    except InputError:
        return False
    return True
