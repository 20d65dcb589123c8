"""Predicts on many inputs and writes the results; what cannot be read is skipped, named and counted."""

import contextlib
import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from d2kd.data.coco import DatasetError
from d2kd.data.images import read_image
from d2kd.visualization import panoptic_picture, prediction_picture

from .files import OutputError, ResultFiles, require_free
from .inputs import ImageFile, InputError, Video
from .predictor import Prediction, Predictor

logger = logging.getLogger(__name__)

#: Threads that read images while the model computes.
READERS = 2
#: Seconds between lines of progress where there is no terminal for a bar.
_EVERY = 10.0


class Summary(NamedTuple):
    """What was predicted on: images and frames, what was skipped, and whether Ctrl-C came before the end."""

    images: int
    frames: int
    skipped: list[str]
    interrupted: bool
    seconds: float


class _Loaded(NamedTuple):
    """An image before the model sees it; `problem` says why there is none."""

    inputs: dict[str, Any]
    image: np.ndarray | None
    problem: str = ""


class Progress:
    """A bar on a terminal, and otherwise a line in the log now and then."""

    def __init__(self, total: int | None, unit: str) -> None:
        """
        Args:
            total: of what is counted; None if unknown.
            unit: what is counted.
        """
        self.bar: Any = tqdm(total=total, unit=unit, disable=None)
        self.total, self.unit, self.count, self.told = total, unit, 0, time.monotonic()

    def add(self, count: int) -> None:
        """Counts some more."""
        self.bar.update(count)
        self.count += count
        if self.bar.disable and time.monotonic() - self.told > _EVERY:
            self.told = time.monotonic()
            logger.info("%d%s %ss", self.count, f" of {self.total}" if self.total else "", self.unit)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()


def predict_files(
    predictor: Predictor,
    images: Sequence[ImageFile],
    videos: Sequence[Video],
    output: str | os.PathLike[str],
    *,
    threshold: float = 0.5,
    batch_size: int = 1,
    pictures: bool = True,
    max_frames: int | None = None,
    overwrite: bool = False,
) -> Summary:
    """Predicts on all inputs and writes pictures and results into a folder.

    With batches of one image results are those of an evaluation; in larger ones, smaller images are padded to the size
    of the others, which changes scores a little.

    Args:
        predictor: the model.
        images, videos: see `find_inputs`.
        output: the folder, empty or new unless `overwrite`.
        threshold: of detections in pictures and table; COCO's results have all.
        batch_size: images the model gets at once.
        pictures: whether to draw.
        max_frames: of each video or camera; None takes all.
        overwrite: whether files in `output` may be replaced.

    Raises:
        UserError: nothing can be read, a video or camera gives no frame, or `output` cannot be written; no files of
            results are left then.
    """
    started = time.monotonic()
    output = os.fspath(output)
    require_free(output, overwrite)
    _keep_inputs(output, predictor, images, videos)
    for video in videos:
        next(video.frames())  # before any time is spent
    run = _Run(predictor, batch_size, pictures, threshold)
    interrupted = False
    with ResultFiles(output, predictor.classes, threshold) as files:
        try:
            if images:
                run.on_images(images, files)
            for video in videos:
                run.on_video(video, files, max_frames)
        except KeyboardInterrupt:  # the usual end of a camera; what is there is kept
            if not files.images:
                raise
            interrupted = True
        if not files.images:
            raise InputError(
                f"None of the {len(images)} images can be read. The first one: {run.skipped[0]}"
                if len(images) > 1
                else run.skipped[0]
            )
    return Summary(run.images, run.frames, run.skipped, interrupted, time.monotonic() - started)


def _keep_inputs(output: str, predictor: Predictor, images: Sequence[ImageFile], videos: Sequence[Video]) -> None:
    """
    Raises:
        OutputError: a picture would take the place of an input.
    """
    files = ResultFiles(output, predictor.classes, 0)
    pairs = [(image.path, files.picture_path(image.name)) for image in images]
    pairs += [(v.path, files.picture_path(v.name, is_video=True)) for v in videos if isinstance(v.path, str)]
    inputs = {os.path.realpath(path) for path, _ in pairs}
    for _, target in pairs:
        if os.path.realpath(target) in inputs:
            raise OutputError(f"--output {output}: {target} would take the place of an input. Name another folder.")


class _Run:
    """Passes batches through the model and hands on what comes out."""

    def __init__(self, predictor: Predictor, batch_size: int, pictures: bool, threshold: float) -> None:
        self.predictor, self.batch_size = predictor, batch_size
        self.pictures, self.threshold = pictures, threshold
        self.images, self.frames = 0, 0
        self.skipped: list[str] = []

    def on_images(self, images: Sequence[ImageFile], files: ResultFiles) -> None:
        with Progress(len(images), "image") as progress:
            for batch in batched(self._load_all(images), self.batch_size):
                for _, loaded in batch:
                    if loaded.problem:
                        self.skipped.append(loaded.problem)
                        logger.warning("Skipped: %s", loaded.problem)
                sound = [(image, loaded) for image, loaded in batch if not loaded.problem]
                predictions = self.predictor.predict([loaded.inputs for _, loaded in sound]) if sound else []
                for (image, loaded), prediction in zip(sound, predictions):
                    files.add(image.path, (loaded.inputs["height"], loaded.inputs["width"]), prediction)
                    if loaded.image is not None:
                        files.add_picture(image.name, self._draw(loaded.image, prediction, files))
                    if prediction.labels is not None:
                        files.add_label_map(image.name, prediction.labels)
                    if prediction.panoptic is not None:
                        files.add_panoptic(image.name, prediction.panoptic)
                    self.images += 1
                progress.add(len(batch))

    def on_video(self, video: Video, files: ResultFiles, max_frames: int | None) -> None:
        total, number = video.count(), 0
        expected = total if max_frames is None or total is None else min(total, max_frames)
        frames = itertools.islice(video.frames(), max_frames)
        with Progress(expected, "frame") as progress, contextlib.ExitStack() as stack:
            add_picture = stack.enter_context(files.video(video.name, video.rate())) if self.pictures else None
            try:
                for batch in batched(frames, self.batch_size):
                    inputs = [self.predictor.prepare(frame) for frame in batch]
                    for frame, prediction in zip(batch, self.predictor.predict(inputs)):
                        files.add(video.title, (frame.shape[0], frame.shape[1]), prediction, number)
                        if add_picture is not None:
                            add_picture(self._draw(frame, prediction, files, in_video=True))
                        number += 1
                    progress.add(len(batch))
            finally:
                self.frames += number
        if expected is not None and number < expected:
            logger.warning("%s: %d of its %d frames can be decoded.", video.title, number, expected)

    def _draw(
        self, image: np.ndarray, prediction: Prediction, files: ResultFiles, in_video: bool = False
    ) -> np.ndarray:
        stuff = files.classes.get("stuff_classes")
        names = {kind: known.names for kind, known in files.classes.items()}
        colors = None if stuff is None else stuff.colors
        if prediction.panoptic is not None:
            ids, segments = prediction.panoptic.ids, prediction.panoptic.segments
            return panoptic_picture(image, ids, segments, names, colors=colors, whole_legend=in_video)
        return prediction_picture(
            image,
            names,
            detections=prediction.detections,
            labels=prediction.labels,
            classes=prediction.classes,
            threshold=self.threshold,
            colors=colors,
            whole_legend=in_video,
        )

    def _load_all(self, images: Sequence[ImageFile]) -> Iterator[tuple[ImageFile, _Loaded]]:
        """Images in their order; a few are read ahead."""
        ahead: deque[tuple[ImageFile, Future[_Loaded]]] = deque()
        with ThreadPoolExecutor(READERS) as readers:
            for image in images:
                ahead.append((image, readers.submit(self._load, image)))
                if len(ahead) > READERS * self.batch_size:
                    first, loading = ahead.popleft()
                    yield first, loading.result()
            for first, loading in ahead:
                yield first, loading.result()

    def _load(self, image: ImageFile) -> _Loaded:
        try:
            inputs = self.predictor.prepare(image.path)
            return _Loaded(inputs, read_image(image.path, "BGR") if self.pictures else None)
        except (DatasetError, OSError) as error:
            return _Loaded({}, None, str(error))


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yields lists of `size` items, the last one of what is left."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
