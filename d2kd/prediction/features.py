"""Feature pictures of a teacher and its student: images in, a picture of each and a file of numbers out."""

import contextlib
import logging
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from d2kd.data.coco import DatasetError, short
from d2kd.data.images import image_problem
from d2kd.data.mapper import build_mapper, wrap_mapper
from d2kd.errors import ConfigError
from d2kd.evaluation.feature_links import NUMBERS, pictures_in
from d2kd.evaluation.report_inputs import evenly_spread
from d2kd.files import replacing, write_json
from d2kd.modeling.feature_comparison import TapComparison, compare
from d2kd.modeling.feature_recording import TEACHER, FeatureRecorder, RecordedMap
from d2kd.visualization import FeatureRow, feature_picture, network_image
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from .files import OutputError
from .inputs import ImageFile, InputError, find_inputs

logger = logging.getLogger(__name__)

#: Of all values, this share lies within the ends of a color scale.
_WITHIN = 0.99
_NUMBERS = "Cosine and CKA: 1 is alike, 0 unrelated; CKA compares whatever the channels are, cosine as the colors do."


class FeatureSummary(NamedTuple):
    """What was drawn and counted.

    Attributes:
        pictures: paths.
        taps: what was compared.
        skipped: why images were not, each with its name.
        left_out: why taps were not, by name.
    """

    pictures: list[Path]
    taps: list[TapComparison]
    skipped: list[str]
    left_out: dict[str, str]


class _Seen(NamedTuple):
    """An image that could be read, and its maps."""

    file: ImageFile
    image: np.ndarray
    maps: Mapping[str, RecordedMap]


def choose_images(cfg: CfgNode, given: Sequence[str], number: int, without: str | None = None) -> list[ImageFile]:
    """Returns the first images of what is given, or else some of the first dataset of `DATASETS.TEST`, evenly spread.

    Args:
        cfg: of the student.
        given: images, folders and patterns; see `find_inputs`.
        number: how many, at most.
        without: a folder whose files are left out, that of the pictures.

    Raises:
        InputError: there are none, none can be read, or there is a video among them.
        DatasetError: the dataset cannot be read.
    """
    if given:
        images, videos = find_inputs(given, without=without)
        if videos:
            raise InputError(f"--images: {videos[0].title} is a video or cannot be read; features are of images.")
        if len(images) > number:
            logger.info("The first %d of %d images are shown (--number).", number, len(images))
        images = images[:number]
        problems = [image_problem(image.path) for image in images]
        if None not in problems:
            raise InputError(
                problems[0] if len(problems) == 1 else f"No image can be read. The first one: {problems[0]}"
            )
        return images
    name = next(iter(cfg.DATASETS.TEST), None)
    if name is None:
        raise InputError("There are no images: give --images, or a dataset in DATASETS.TEST.")
    if name not in DatasetCatalog.list():
        raise InputError(f"DATASETS.TEST {name!r} is not registered: give --images.")
    try:
        records = list(DatasetCatalog.get(name))
    except OSError as error:
        raise InputError(f"DATASETS.TEST {name!r} cannot be read ({error}): give --images.") from error
    if not records:
        raise InputError(f"DATASETS.TEST {name!r} holds no images: give --images.")
    paths = [str(record["file_name"]) for record in evenly_spread(records, number)]
    return [ImageFile(path, os.path.basename(path)) for path in paths]


def compare_features(
    cfg: CfgNode,
    recorder: FeatureRecorder,
    images: Sequence[ImageFile],
    output: str | os.PathLike[str],
    *,
    columns: Mapping[str, str],
    about: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> FeatureSummary:
    """Compares features over some images, and writes a picture of each and `features.json` into a folder.

    All is drawn before the first file is written. Pictures that an earlier `features.json` there names are removed.

    Args:
        cfg: of the student, for its preprocessing.
        recorder: runs the models.
        images: see `choose_images`.
        output: the folder; made if need be.
        columns: titles of the columns by role, "teacher" first.
        about: further entries of `features.json`.
        notes: sentences below each picture.

    Raises:
        InputError: no image can be read.
        ConfigError: no tap gives maps.
        OutputError: the folder cannot be written into.
    """
    seen, skipped = _look(cfg, recorder, images)
    names = [pair.name for pair in recorder.pairs]
    for name, why in recorder.left_out.items():
        logger.warning("Tap %s is left out: %s", name, why)
    if not names:
        reasons = "; ".join(f"{name}: {why}" for name, why in recorder.left_out.items())
        raise ConfigError(f"There is no tap with maps to compare (--taps). {reasons}".strip())
    taps = [compare(pair, [s.maps[pair.name] for s in seen]) for pair in recorder.pairs]
    end = _end([x for tap in taps for m in tap.maps for x in m.differences.values()])
    ends = {tap.pair.name: _mean_end(tap) for tap in taps}
    files = _file_names([s.file.name for s in seen])
    pictures = {}
    for number, (file, s) in enumerate(zip(files, seen)):
        rows = [_row(tap, number, columns, ends[tap.pair.name]) for tap in taps]
        drawn = feature_picture(
            s.image, rows, end, f"Features over {short(s.file.name)}", [*_alignments(taps), _NUMBERS, *notes]
        )
        pictures[file] = cv2.imencode(".png", drawn, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1].tobytes()
    content = {
        **(about or {}),
        "images": [{"file": s.file.path, "picture": file} for file, s in zip(files, seen)],
        "skipped": skipped,
        "taps": [{**_numbers(tap), "scale_of_means": ends[tap.pair.name]} for tap in taps],
        "left_out": recorder.left_out,
        "scale_of_differences": end,
    }
    folder = Path(output)
    _write(folder, pictures, content)
    return FeatureSummary([folder / file for file in files], taps, skipped, dict(recorder.left_out))


def _look(cfg: CfgNode, recorder: FeatureRecorder, images: Sequence[ImageFile]) -> tuple[list[_Seen], list[str]]:
    mapper = wrap_mapper(build_mapper(cfg, is_train=False), "error", evaluates=True, advice="")
    seen: list[_Seen] = []
    skipped: list[str] = []
    for file in images:
        try:
            inputs = mapper({"file_name": file.path, "image_id": 0})
        except (DatasetError, OSError) as error:
            logger.warning("Skipped: %s", error)
            skipped.append(str(error))
            continue
        maps = recorder(inputs)
        seen.append(_Seen(file, network_image(inputs["image"].cpu().numpy(), cfg.INPUT.FORMAT), maps))
        logger.info("%d of %d images", len(seen) + len(skipped), len(images))
    if not seen:
        first = skipped[0] if skipped else "there is none."
        raise InputError(f"None of the {len(images)} images can be read. The first one: {first}")
    return seen, skipped


def _mean_end(tap: TapComparison) -> float:
    """The end of the color scale of a tap's means, over all images."""
    return _end([np.abs(x) for m in tap.maps for x in m.means.values()])


def _end(maps: Sequence[np.ndarray]) -> float:
    return _rounded_up(float(np.quantile(np.concatenate([x.ravel() for x in maps]), _WITHIN)))


def _rounded_up(value: float) -> float:
    """The next number of two digits; 1 for 0."""
    if value <= 0:
        return 1.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(math.ceil(value / unit - 1e-9) * unit)


def _row(tap: TapComparison, number: int, columns: Mapping[str, str], end: float) -> FeatureRow:
    student, teacher = tap.pair.pair
    ours, theirs = tap.channels
    title = f"{student.name}: {ours} channels, stride {student.stride:g}"
    if (student.name, ours, student.stride) != (teacher.name, theirs, teacher.stride):
        title += f"; the teacher's {teacher.name}: {theirs} channels, stride {teacher.stride:g}"
    maps = tap.maps[number]
    return FeatureRow(
        title,
        _in_words(tap, columns),
        teacher.stride,
        {columns[role]: maps.means[role] for role in columns},
        end,
        {columns[role]: maps.colors[role] for role in columns},
        {columns[role]: x for role, x in maps.differences.items()},
        {columns[role]: f"{math.sqrt(np.square(x).mean()):.2f} in this image" for role, x in maps.differences.items()},
    )


def _in_words(tap: TapComparison, columns: Mapping[str, str]) -> str:
    """The numbers over all images."""
    roles = [role for role in columns if role != TEACHER]
    numbers = [tap.numbers[role] for role in roles]
    parts = [
        f"{name} {' > '.join(f'{getattr(n, key):.2f}' for n in numbers)}".replace(">", "\N{RIGHTWARDS ARROW}")
        for name, key in (("cosine", "cosine"), ("CKA", "cka"), ("difference", "difference"))
    ]
    which = f" ({columns[roles[0]]} \N{RIGHTWARDS ARROW} {columns[roles[1]].rpartition(' ')[2]})" if roles[1:] else ""
    share = sum(tap.variance)
    return f"over all images: {', '.join(parts)}{which}; the colors show {share:.0%} of the variance"


def _alignments(taps: Sequence[TapComparison]) -> list[str]:
    """Which channels of the student were compared with which of the teacher's."""
    by_how: dict[str, list[str]] = {}
    for tap in taps:
        by_how.setdefault(tap.how, []).append(tap.pair.name)
    return [f"Colors and difference of {', '.join(names)}: {how}." for how, names in by_how.items()]


def _numbers(tap: TapComparison) -> dict[str, Any]:
    student, teacher = tap.pair.pair
    return {
        "student": student.name,
        "teacher": teacher.name,
        "channels": {"student": tap.channels[0], "teacher": tap.channels[1]},
        "stride": {"student": student.stride, "teacher": teacher.stride},
        "alignment": tap.how,
        "positions": tap.positions,
        "variance": tap.variance,
        **{role: asdict(numbers) for role, numbers in tap.numbers.items()},
    }


def _file_names(names: Sequence[str]) -> list[str]:
    """A PNG file for each image, in one folder, no two alike."""
    files: list[str] = []
    for name in names:
        # bytes that are no UTF-8 cannot stand in the links of a report
        stem = re.sub("[\ud800-\udfff]", "_", os.path.splitext(name)[0].replace(os.sep, "_"))
        file, number = f"{stem}.png", 1
        while file in files:
            number += 1
            file = f"{stem}_{number}.png"
        files.append(file)
    return files


@contextlib.contextmanager
def claimed(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Makes a folder and sees to it that it takes files; after an error it is removed again, if it is empty and new.

    Raises:
        OutputError: it takes none.
    """
    path = Path(folder)
    made = [p for p in (path, *path.parents) if not p.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        raise OutputError(f"--output {folder} cannot be written: {error.strerror or error}.") from error
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for p in made:
                p.rmdir()
        raise


def _write(folder: Path, pictures: Mapping[str, bytes], content: Mapping[str, Any]) -> None:
    old = pictures_in(folder)
    new: list[Path] = []
    try:
        for file, data in pictures.items():
            if not (folder / file).exists():
                new.append(folder / file)
            with replacing(folder / file) as temporary:
                temporary.write_bytes(data)
        write_json(folder / NUMBERS, content)
    except OSError as error:
        for path in new:
            path.unlink(missing_ok=True)
        raise OutputError(f"--output {folder} cannot be written: {error.strerror or error}.") from error
    for path in old:
        if path.name not in pictures:
            path.unlink(missing_ok=True)
