"""Checks a COCO annotation file before any training time is spent on it."""

import logging
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from .image_files import check_image_files
from .reading import CocoFile, DatasetError, Entries, id_of, read_coco, short, without_gc
from .segmentation import SegmentationError, usable_segmentation

logger = logging.getLogger(__name__)

# How far a box may reach out of its image without a word, in pixels; annotation tools round.
BOX_TOLERANCE = 1.0
# Numbers beyond this are no coordinates.
_MAX_COORDINATE = 1e9


class CocoSummary(NamedTuple):
    """What a COCO file holds."""

    num_images: int
    num_annotations: int
    class_names: list[str]  # in the order of the category ids
    num_crowds: int
    num_objects: int  # annotations with a box of positive size that are no crowds


@without_gc()
def validate_coco_json(
    path: str,
    image_root: str | None = None,
    *,
    need_annotations: bool = True,
    missing_images: str = "error",
    masks: str = "",
    evaluated: bool = False,
    as_it_stands: bool = False,
) -> CocoSummary:
    """Checks that a file is a sound COCO instances file.

    Some faults are a warning only: files that are listed twice, boxes without a positive width and height (COCO itself
    has some), and, unless they are most, boxes that reach out of their image and polygons far from their box.

    Args:
        path: the annotation file.
        image_root: folder of the images; if given, every listed image must be there.
        need_annotations: whether a file without "annotations" (an image list) is an error.
        missing_images: "error", or "warn" where training leaves out images that cannot be read.
        masks: what a model with masks needs: "polygon" or "bitmask" of every object in training, "any" of every
            annotation in evaluation; "" is for models without, and looks at no segmentation.
        evaluated: whether `area` counts, as it does in evaluation.
        as_it_stands: whether the file is read by another loader than `load_coco`, which takes what this corrects
            (floats for whole numbers, flags as text) otherwise: then it is an error.

    Returns:
        how many images, annotations and objects it has, and its classes.

    Raises:
        DatasetError: at the first thing that is wrong.
    """
    file = read_coco(path, need_annotations=need_annotations)
    if file.notes and as_it_stands:
        raise DatasetError(
            f"{path}: {file.notes[0]}, which the loader of this dataset takes otherwise. Correct the file, or register "
            "it in DATASETS.REGISTER."
        )
    for note in file.notes:
        logger.info("%s: %s; read as what is meant", path, note)
    _check_file_names(file)
    objects = _check_boxes(file, evaluated) if file.annotations else 0
    if masks:
        _check_masks(file, masks)
    if evaluated:
        for annotation in file.annotations:
            area_of(file, annotation)
    if image_root is not None:
        check_image_files(file, image_root, missing_images)
    _tell_empty_classes(file, evaluated)
    crowds = sum(annotation["iscrowd"] for annotation in file.annotations)
    return CocoSummary(len(file.images), len(file.annotations), file.class_names, crowds, objects)


def area_of(file: CocoFile, annotation: dict[str, Any]) -> float | None:
    """Returns the area of an annotation in square pixels, by which COCO's evaluation tells small from large; None
    where there is none.

    Raises:
        DatasetError: it is no such number.
    """
    area = annotation.get("area")
    if area is None or (type(area) in (int, float) and 0 <= area <= _MAX_COORDINATE**2):
        return area
    raise DatasetError(
        f"{file.path}: {file.where(annotation)} has area = {short(repr(area))}. It must be a number of square pixels; "
        "without it, that of the box is taken."
    )


def _tell_empty_classes(file: CocoFile, evaluated: bool) -> None:
    """Where there are objects at all, classes without any are named."""
    present = {annotation["category_id"] for annotation in file.annotations}
    empty = [category["name"] for category in file.sorted_categories() if category["id"] not in present]
    if present and empty:
        logger.warning(
            f"{file.path}: {len(empty)} of {len(file.categories)} classes have no objects: {short(', '.join(empty))}. "
            f"{'Their AP is nan' if evaluated else 'Nothing is learned of them'}."
        )


def _check_file_names(file: CocoFile) -> None:
    names = Counter(image["file_name"] for image in file.images)
    if len(names) < len(file.images):
        name, count = names.most_common(1)[0]
        logger.warning(
            f"{file.path}: {len(file.images)} images have only {len(names)} files, {short(name)} is listed {count} "
            "times. Each image is used with its own annotations only: merge those of one file."
        )


def _check_boxes(file: CocoFile, evaluated: bool) -> int:
    """Boxes must be four numbers, and most of them inside their image; returns how many objects have one."""
    boxes = _box_array(file)
    size_of = {image["id"]: (image["width"], image["height"]) for image in file.images}
    sizes = np.array([size_of[a["image_id"]] for a in file.annotations], dtype=float)
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    beyond = np.maximum(-low, high - sizes).max(1)
    crossing = beyond > BOX_TOLERANCE
    if crossing.any():
        gone = ((low >= sizes) | (high <= 0)).any(1) & crossing
        as_corners = (boxes[:, 2:] > low).all() and (boxes[:, 2:] <= sizes + BOX_TOLERANCE).all()
        share = crossing.mean()
        words = _outside(file, boxes, gone if gone.any() else crossing, "wholly " if gone.any() else "")
        if gone.any() or share > 0.5 or (as_corners and share > 0.1):
            hint = " They look like [x1, y1, x2, y2]." if as_corners else ""
            raise DatasetError(f"{words}{hint} COCO boxes are [x, y, width, height] in pixels: correct them.")
        logger.warning("%s They are clipped in training%s.", words, ", and not in evaluation" if evaluated else "")
    empty = (boxes[:, 2:] <= 0).any(1)
    if empty.any():
        first = file.annotations[int(empty.argmax())]
        logger.warning(
            f"{file.path}: {int(empty.sum())} of {len(boxes)} boxes have no positive width and height, first annotation"
            f"{id_of(first)}; {'no detection can match them' if evaluated else 'they are left out in training'}"
        )
    tiny = (boxes[:, 2:] < 1).all(1) & ~empty
    if tiny.mean() >= 0.9:
        first = file.annotations[int(tiny.argmax())]
        logger.warning(
            f"{file.path}: {int(tiny.sum())} of {len(boxes)} boxes are smaller than one pixel, first annotation"
            f"{id_of(first)} with bbox {first['bbox']}. Are they shares of the image's size, from 0 to 1? COCO boxes "
            "are [x, y, width, height] in pixels."
        )
    crowd = np.array([annotation["iscrowd"] for annotation in file.annotations], dtype=bool)
    return int((~empty & ~crowd).sum())


def _outside(file: CocoFile, boxes: np.ndarray, which: np.ndarray, how: str) -> str:
    annotation = file.annotations[int(which.argmax())]
    image = next(image for image in file.images if image["id"] == annotation["image_id"])
    return (
        f"{file.path}: {int(which.sum())} of {len(boxes)} boxes lie {how}outside their image by more than "
        f"{BOX_TOLERANCE:g} px, first annotation{id_of(annotation)} with bbox {annotation['bbox']} in "
        f"{short(image['file_name'])}, which is {image['width']} x {image['height']} (width x height)."
    )


def _box_array(file: CocoFile) -> np.ndarray:
    """All boxes (N, 4), as [x, y, width, height]."""
    try:
        boxes = np.array([a["bbox"] for a in file.annotations])
        is_table = boxes.shape == (len(file.annotations), 4) and boxes.dtype.kind in "if"
        if is_table and (np.abs(boxes) <= _MAX_COORDINATE).all():
            return boxes.astype(float, copy=False)
    except (ValueError, OverflowError):
        pass  # Lists of different lengths, or huge numbers; the first wrong one is named below.
    wrong = next(a for a in file.annotations if not _is_box(a["bbox"]))
    if not isinstance(wrong["bbox"], list):
        i = file.annotations.index(wrong)
        raise DatasetError(
            f"{file.path} is not in COCO format: annotations[{i}]{id_of(wrong)} has bbox = "
            f"{short(repr(wrong['bbox']))}. It must be [x, y, width, height], four finite numbers."
        )
    raise DatasetError(
        f"{file.path}: annotation{id_of(wrong)} of image {short(wrong['image_id'])} has bbox {short(wrong['bbox'])}. "
        f"It must be [x, y, width, height], four finite numbers of at most {_MAX_COORDINATE:g}."
    )


def _is_box(box: Any) -> bool:
    # also false for NaN, and for booleans, which are no coordinates
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(type(v) in (int, float) and -_MAX_COORDINATE <= v <= _MAX_COORDINATE for v in box)
    )


def _check_masks(file: CocoFile, masks: str) -> None:
    """Every annotation must have a segmentation that masks can be made of; in training, crowds need none."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in file.images}
    wanted = [a for a in file.annotations if masks == "any" or not a["iscrowd"]]
    wrong: list[tuple[dict[str, Any], str]] = []
    runs: Entries = []
    cut: Entries = []
    astray: Entries = []
    for annotation in wanted:
        value = annotation.get("segmentation")
        try:
            usable = usable_segmentation(value, *sizes[annotation["image_id"]])
        except SegmentationError as error:
            wrong.append((annotation, str(error)))
            continue
        if isinstance(usable, dict):
            runs.append(annotation)
            continue
        if usable is not value:
            cut.append(annotation)
        if _is_astray(usable, annotation["bbox"]):
            astray.append(annotation)
    if wrong:
        first, reason = wrong[0]
        raise DatasetError(
            f"{file.path}: {len(wrong)} of {len(wanted)} annotations have no mask that can be used, first "
            f"{file.where(first)}: its segmentation {reason}. MODEL.MASK_ON needs one of each: correct them, remove "
            "them, or set MODEL.MASK_ON False."
        )
    if runs and masks == "polygon":
        raise DatasetError(
            f"{file.path}: {len(runs)} of {len(wanted)} annotations have RLE masks, first {file.where(runs[0])}, and "
            "INPUT.MASK_FORMAT is polygon: set it to bitmask."
        )
    _tell_polygons(file, len(wanted), astray, cut)


def _tell_polygons(file: CocoFile, total: int, astray: Entries, cut: Entries) -> None:
    if astray:
        words = (
            f"{file.path}: the polygons of {len(astray)} of {total} annotations lie wholly outside their box, first "
            f"{file.where(astray[0])}. COCO's polygons are in pixels of the whole image, as boxes are."
        )
        if len(astray) > 0.5 * total:
            raise DatasetError(f"{words} Correct them, or set MODEL.MASK_ON False.")
        logger.warning(words)
    if cut:
        logger.warning(
            f"{file.path}: {len(cut)} of {total} annotations have polygons with fewer than three points or an odd "
            f"number of coordinates, first {file.where(cut[0])}; they are used without these."
        )


def _is_astray(polygons: list[list[float]], box: list[float]) -> bool:
    """Whether polygons do not touch their box, up to rounding."""
    x, y, width, height = box
    left, right = x - BOX_TOLERANCE, x + width + BOX_TOLERANCE
    top, bottom = y - BOX_TOLERANCE, y + height + BOX_TOLERANCE
    first_x, first_y = polygons[0][:2]
    if left <= first_x <= right and top <= first_y <= bottom:  # as nearly always
        return False
    xs, ys = ([v for polygon in polygons for v in polygon[axis::2]] for axis in (0, 1))
    return max(xs) < left or min(xs) > right or max(ys) < top or min(ys) > bottom
