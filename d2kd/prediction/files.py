"""The files of predictions: a table, COCO's formats, pictures. Each is whole or not there."""

import contextlib
import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import cv2
import numpy as np
import pycocotools.mask as mask_util

from d2kd.errors import UserError
from d2kd.files import replacing, require_writable

from .classes import ClassList, numbered
from .inputs import is_utf8, picture_name
from .panoptic import PanopticMap, annotation, id_picture, panoptic_file
from .predictor import Prediction

TABLE, IMAGES = "predictions.csv", "images.json"
#: As the evaluators call them.
DETECTIONS, LABELS, CLASSES = (
    "coco_instances_results.json",
    "sem_seg_predictions.json",
    "classification_predictions.json",
)
PICTURES, LABEL_MAPS, PANOPTIC = "pictures", "label_maps", "panoptic"
COLUMNS = ("file", "frame", "class_id", "class", "score", "x0", "y0", "x1", "y1", "pixels")


class OutputError(UserError):
    """A folder that cannot be, or must not be, written into."""


class _JsonList:
    """A JSON array that is written entry by entry, so that no video is too long."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.count = 0

    def add(self, entry: Mapping[str, Any]) -> None:
        self.file.write(",\n" if self.count else "[\n")
        self.file.write(json.dumps(entry, ensure_ascii=False))
        self.count += 1

    def end(self) -> None:
        self.file.write("\n]\n" if self.count else "[]\n")


class ResultFiles:
    """A context in which results are added; at its end the files take their names, after an error none is left.

    Pictures and label maps take theirs at once.
    """

    def __init__(self, folder: str | os.PathLike[str], classes: Mapping[str, ClassList], threshold: float) -> None:
        """
        Args:
            folder: where they go.
            classes: names and ids by kind.
            threshold: detections with a lower score are not in the table; COCO's file has all that the model gives.
        """
        self.folder = Path(folder)
        self.classes = dict(classes)
        self.threshold = threshold
        self.images: list[dict[str, Any]] = []
        self._stack = contextlib.ExitStack()
        self._files: dict[str, TextIO] = {}
        self._lists: dict[str, _JsonList] = {}
        self._made: Path | None = None
        self._panoptic: list[dict[str, Any]] = []
        self._stems: dict[str, str] = {}

    def __enter__(self) -> "ResultFiles":
        made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        self._made = made[0] if made else None
        with _told(self.folder):
            self._table = csv.writer(self._open(TABLE))
            self._table.writerow(COLUMNS)
            self._open(IMAGES)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            with _told(self.folder), self._stack:
                for entries in self._lists.values():
                    entries.end()
                json.dump(self._image_file(), self._files[IMAGES], ensure_ascii=False, indent=1)
                if self._panoptic:
                    content = panoptic_file(self.images, self._panoptic, self.classes)
                    json.dump(content, self._open(f"{PANOPTIC}.json"), ensure_ascii=False, indent=1)
        else:
            self._stack.__exit__(kind, error, trace)
            if self._made is not None:  # by this run, unless there is a picture in it
                with contextlib.suppress(OSError):
                    self._made.rmdir()

    def _open(self, name: str) -> TextIO:
        temporary = self._stack.enter_context(replacing(self.folder / name))
        # newlines are the table's own; names of files may be no UTF-8, and JSON reads what stands for their bytes
        opened = open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="")
        file = self._stack.enter_context(opened)
        self._files[name] = file
        return file

    def _list(self, name: str) -> _JsonList:
        if name not in self._lists:
            self._lists[name] = _JsonList(self._open(name))
        return self._lists[name]

    def add(self, file: str, size: tuple[int, int], prediction: Prediction, frame: int | None = None) -> None:
        """Adds what was predicted for an image.

        Args:
            file: its path.
            size: (height, width).
            prediction: for it.
            frame: its number in a video, from 0.

        Raises:
            OutputError: there is no room.
        """
        number = len(self.images) + 1
        place = {} if frame is None else {"frame": frame}
        self.images.append({"id": number, "file_name": file, **place, "height": size[0], "width": size[1]})
        row = [file, "" if frame is None else frame]
        with _told(self.folder):
            if prediction.labels is not None:
                self._add_labels(number, file, row, prediction.labels)
            if prediction.classes is not None:
                self._add_classes(number, file, row, prediction.classes)
            if prediction.detections is not None:
                self._add_detections(number, row, prediction.detections)

    def _add_detections(self, number: int, row: list[Any], detections: Sequence[Mapping[str, Any]]) -> None:
        known = self._of("thing_classes", (d["category_id"] for d in detections))
        results = self._list(DETECTIONS)
        for detection in detections:
            label = detection["category_id"]
            results.add({**detection, "image_id": number, "category_id": known.ids[label]})
        for detection in sorted(detections, key=lambda d: -d["score"]):
            if detection["score"] < self.threshold:
                break
            label, (x, y, width, height) = detection["category_id"], detection["bbox"]
            mask = detection.get("segmentation")
            box = [round(side, 2) for side in (x, y, x + width, y + height)]
            pixels = "" if mask is None else int(mask_util.area(mask))
            self._table.writerow([*row, label, known.names[label], round(detection["score"], 4), *box, pixels])

    def _add_labels(self, number: int, file: str, row: list[Any], labels: np.ndarray) -> None:
        present, counts = np.unique(labels, return_counts=True)
        known = self._of("stuff_classes", present.tolist())
        results = self._list(LABELS)
        for label, pixels in zip(present.tolist(), counts.tolist()):
            mask = mask_util.encode(np.asfortranarray(labels == label, dtype=np.uint8))
            encoded = {**mask, "counts": mask["counts"].decode("ascii")}
            results.add(
                {"file_name": file, "image_id": number, "category_id": known.ids[label], "segmentation": encoded}
            )
            self._table.writerow([*row, label, known.names[label], *[""] * 5, pixels])

    def _add_classes(self, number: int, file: str, row: list[Any], classes: Sequence[tuple[int, float]]) -> None:
        known = self._of("thing_classes", (label for label, _ in classes))
        self._list(CLASSES).add(
            {
                "image_id": number,
                "file_name": file,
                "classes": [label for label, _ in classes],
                "names": [known.names[label] for label, _ in classes],
                "scores": [score for _, score in classes],
            }
        )
        for label, score in classes:
            self._table.writerow([*row, label, known.names[label], round(score, 4), *[""] * 5])

    def _of(self, kind: str, labels: Any) -> ClassList:
        """The classes of a kind; those of a model that nothing is known of are numbered as they come."""
        needed = max(labels, default=-1) + 1
        known = self.classes.get(kind, numbered(0))
        if needed > len(known.names):
            self.classes[kind] = known = numbered(needed, first_id=1 if kind == "thing_classes" else 0)
        return known

    def _image_file(self) -> dict[str, Any]:
        """A COCO file without annotations, by which the ids in the others can be told."""
        categories = [
            {"id": number, "name": name}
            for kind, known in sorted(self.classes.items(), reverse=True)  # things before stuff
            for number, name in zip(known.ids, known.names)
            if kind == "thing_classes" or LABELS in self._lists
        ]
        return {"images": self.images, "annotations": [], "categories": categories}

    # ---- pictures ----

    def picture_path(self, name: str, *, is_video: bool = False) -> Path:
        """Returns where the picture of an input goes."""
        return self.folder / PICTURES / picture_name(name, is_video=is_video)

    def add_picture(self, name: str, picture: np.ndarray) -> None:
        """Writes the picture of an image.

        Raises:
            OutputError: there is no room.
        """
        write_image(self.picture_path(name), picture)

    def add_label_map(self, name: str, labels: np.ndarray) -> None:
        """Writes a label map of an image: a PNG with the class of every pixel, 8 bits, or 16 where classes need them.

        Raises:
            OutputError: there is no room.
        """
        kind = np.uint8 if labels.max(initial=0) < 256 else np.uint16
        write_image(self.folder / LABEL_MAPS / self._png(name), labels.astype(kind))

    def add_panoptic(self, name: str, panoptic: PanopticMap) -> None:
        """Writes the ids of an image's segments as COCO's panoptic format does, a PNG, and adds what they are.

        The image is the one that was added last.

        Raises:
            OutputError: there is no room.
        """
        for isthing, kind in ((True, "thing_classes"), (False, "stuff_classes")):
            self._of(kind, (s["category_id"] for s in panoptic.segments if s["isthing"] == isthing))
        file = self._png(name)
        write_image(self.folder / PANOPTIC / file, id_picture(panoptic.ids))
        self._panoptic.append(annotation(self.images[-1]["id"], Path(file).as_posix(), panoptic))

    def _png(self, name: str) -> str:
        """The PNG file for an input, which no other has."""
        stem, number = os.path.splitext(name)[0], 1
        file = f"{stem}.png"
        while self._stems.setdefault(file, name) != name:
            number += 1
            file = f"{stem}_{number}.png"
        return file

    @contextlib.contextmanager
    def video(self, name: str, rate: float) -> Iterator[Any]:
        """Yields a function that adds a picture to the video of that name.

        Raises:
            OutputError: it cannot be written.
        """
        path = self.picture_path(name, is_video=True)
        if not is_utf8(str(path)):
            raise OutputError(f"--output: {str(path)!r} is not UTF-8, and OpenCV cannot write it: name another folder.")
        writer: cv2.VideoWriter | None = None
        size = 0, 0
        with _told(self.folder), replacing(path) as temporary:

            def add(picture: np.ndarray) -> None:
                nonlocal writer, size
                if writer is None:
                    size = picture.shape[0] // 2 * 2, picture.shape[1] // 2 * 2  # codecs want even sides
                    code = cv2.VideoWriter.fourcc(*"mp4v")
                    writer = cv2.VideoWriter(str(temporary), code, rate, size[::-1])
                    if not writer.isOpened():
                        raise OutputError(f"OpenCV cannot write the video {path}: take --no-pictures.")
                if (picture.shape[0] // 2 * 2, picture.shape[1] // 2 * 2) != size:
                    picture = cv2.resize(picture, size[::-1])
                writer.write(np.ascontiguousarray(picture[: size[0], : size[1]]))

            try:
                yield add
            finally:
                if writer is not None:
                    writer.release()


def write_image(path: Path, image: np.ndarray) -> None:
    """Writes an image in the format of its ending, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    quality = [cv2.IMWRITE_JPEG_QUALITY, 95] if path.suffix.lower() in (".jpg", ".jpeg") else []
    content = cv2.imencode(path.suffix, image, quality)[1]
    with _told(path.parent), replacing(path) as temporary:
        temporary.write_bytes(content.tobytes())


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Errors of the file system in one line."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"--output: {error.filename or folder} cannot be written ({error.strerror}).") from error


def require_free(folder: str, overwrite: bool) -> None:
    """
    Raises:
        OutputError: it is no folder, or none can be made there; or there are files in it, and they are not to be
            overwritten.
    """
    path = Path(folder)
    require_writable("--output", path)
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise OutputError(
            f"--output {folder} is not empty: name another folder, or give --overwrite to replace files there."
        )
