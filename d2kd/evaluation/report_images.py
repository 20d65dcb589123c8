"""The images of report.html: which are shown, and each as the page's script draws it."""

import base64
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from d2kd.evaluation.report_inputs import ReportInputs, problem_of
from d2kd.evaluation.report_pictures import classes_said, true_labels
from d2kd.evaluation.report_selection import Ranked, has_truth, rank
from d2kd.evaluation.results import ModelResult
from d2kd.files import finite
from d2kd.visualization import NO_LABEL
from d2kd.visualization.label_maps import class_colors
from d2kd.visualization.matching import bitmap, judge, objects_of
from detectron2.data import detection_utils

#: At most so many images, of at most so many pixels in width and height, and so many bytes in all.
MAX_IMAGES = 24
MAX_SIDES = {"detections": 640, "label_maps": 640, "classes": 320}
MAX_BYTES = 9_000_000
#: Smaller images are compressed less.
SMALL = 320
#: Detections with a lower score, and more than so many of a model on an image, are left out.
LOWEST_SCORE = 0.05
MAX_DETECTIONS = 50
#: Outlines of masks are traced on a grid of at least so many cells along the larger side.
OUTLINE_CELLS = 512
#: RGB of right pixels, which stay clear, of wrong ones, as page.css has it, and of those that do not count.
ERROR_COLORS = np.array([[0, 0, 0], [213, 94, 0], [128, 128, 128]], np.uint8)
#: Names of images that cannot be read are listed up to so many.
MAX_NAMES = 5

Json = dict[str, Any]


class Picture(NamedTuple):
    """An image as the page has it: at most `MAX_SIDES` pixels, in JPEG."""

    source: str  # a data URI
    height: int
    width: int
    scale: float  # of these to those of the file
    size: tuple[int, int]  # (height, width) of the file


def browser_images(models: Mapping[str, ModelResult], inputs: ReportInputs, threshold: float) -> Json:
    """What the image browser of a page shows, to be written as JSON.

    Args:
        models: by name.
        inputs: images and predictions.
        threshold: the score from which on detections count, at first.

    Returns:
        `kind`; `models`, the names of those that have predictions, and `titles` of all; `has_truth`; `classes`;
        `threshold` and `lowest` score; `images`, those where the models differ most first, at most `MAX_IMAGES` and
        `MAX_BYTES`; `notes`, sentences on what is shown and what is left out.
    """
    ranked, how = rank(inputs, threshold)
    lowest = min(LOWEST_SCORE, threshold)
    encode = {"detections": _with_detections, "label_maps": _with_label_maps, "classes": _with_classes}[inputs.kind]
    images, problems = _collect(ranked, lambda record: encode(inputs, record, lowest))
    pair = inputs.pair
    content = {
        "kind": inputs.kind,
        "models": list(inputs.predictions),
        "titles": {name: model.title for name, model in models.items()},
        "numbers": {name: number for number, name in enumerate(models)},
        "pair": list(pair) if pair else None,
        "has_truth": has_truth(inputs),
        "classes": _class_names(inputs),
        "threshold": threshold,
        "lowest": lowest,
        "images": images,
    }
    if inputs.kind == "label_maps":
        content["colors"] = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in _palette(inputs)]
    content["notes"] = list(_notes(models, inputs, len(images), how, problems, lowest))
    return finite(content)


def _collect(ranked: Iterable[Ranked], encode: Callable[[dict[str, Any]], Json]) -> tuple[list[Json], list[str]]:
    """The first images that can be read and have room, and what is wrong with those before them that cannot."""
    images: list[Json] = []
    problems: list[str] = []
    size = 0
    for record, difference in ranked:
        if len(images) == MAX_IMAGES or len(problems) > 4 * MAX_IMAGES:
            break
        problem = problem_of(record, decode=True)
        if problem is not None:
            problems.append(problem)
            continue
        item = {"name": _name(record), "difference": round(difference, 4), **encode(record)}
        size += len(json.dumps(item))
        if size > MAX_BYTES and images:
            break
        images.append(item)
    return images, problems


def _notes(
    models: Mapping[str, ModelResult],
    inputs: ReportInputs,
    shown: int,
    how: str,
    problems: Sequence[str],
    lowest: float,
) -> Iterable[str]:
    total = len(inputs.records)
    names = [models[name].title for name in inputs.pair] if inputs.pair else []
    which = how.format(*names)
    if shown:
        yield f"{shown:,} of {total:,} images of {inputs.dataset_name} are in this page: {which}."
    if inputs.kind == "detections":
        yield (
            f"Detections with a score below {lowest:g}, and of each model and image all but the "
            f"{MAX_DETECTIONS} best, are left out; so are crowds, and what lies within them."
        )
        compared = "masks" if inputs.by_masks else "boxes"
        if has_truth(inputs):
            yield (
                f"Found: the right class, an IoU of {compared} of at least 0.5, and no better detection has found the "
                "same object. Wrong: all other detections. Missed: objects that no shown detection finds."
            )
        else:
            yield "There is no ground truth: what is found is neither right nor wrong."
    yield f"Images are at most {MAX_SIDES[inputs.kind]} pixels wide and high, compressed as JPEG."
    missing = [model.title for name, model in models.items() if name not in inputs.predictions]
    if missing:
        yield f"No predictions were kept of: {', '.join(missing)}."
    if problems:
        more = f" And {len(problems) - MAX_NAMES:,} more." if len(problems) > MAX_NAMES else ""
        yield f"Left out, as they cannot be read: {' '.join(problems[:MAX_NAMES])}{more}"


def _with_detections(inputs: ReportInputs, record: dict[str, Any], lowest: float) -> Json:
    picture = _picture(inputs, record)
    size = picture.size  # masks of another one, by a rounded pixel, have nothing in common
    truth = objects_of(record)
    models = {}
    draws_masks = False
    for name, by_image in inputs.predictions.items():
        said = by_image.get(record["image_id"], [])
        found, finds = judge(said, record, lowest, size if inputs.by_masks else None)
        found = found[:MAX_DETECTIONS]
        draws_masks |= any(p.get("mask") for p in found)
        models[name] = [
            {
                **_object(p["box"], p["label"], p.get("mask"), size, picture.scale),
                "score": round(p["score"], 4),
                "finds": int(place),
                **({"points": _scaled(p["points"], picture.scale)} if p.get("points") else {}),
            }
            for p, place in zip(found, finds)
        ]
    # segmentations of data for models without masks may be anything
    masks = truth.masks if draws_masks else [None] * len(truth.masks)
    objects = [
        _object(box, int(label), mask, size, picture.scale)
        for box, label, mask in zip(truth.boxes, truth.labels, masks)
    ]
    return {**_shown(picture), "truth": objects, "found": models}


def _object(box: Any, label: int, mask: Any, size: tuple[int, int], scale: float) -> Json:
    x0, y0, x1, y1 = (round(float(v) * scale, 1) for v in box)
    drawn = {"box": [x0, y0, round(x1 - x0, 1), round(y1 - y0, 1)], "label": label}
    return {**drawn, "outline": outline(mask, size, scale)} if mask is not None and len(mask) else drawn


def outline(mask: Any, size: tuple[int, int], scale: float) -> str:
    """The edges of a mask as the path of an SVG, to be filled by the rule "evenodd".

    Args:
        mask: in one of COCO's formats, of an image of that (height, width).
        size: of the image.
        scale: of the path's units to pixels of the image.
    """
    grid = max(scale, OUTLINE_CELLS / max(size))
    cells = cv2.resize(bitmap(mask, *size), None, fx=grid, fy=grid, interpolation=cv2.INTER_NEAREST)
    edges, _ = cv2.findContours(cells, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    coarse = max(0.8, 0.6 * grid)  # the steps of enlarged pixels are no corners
    paths = []
    for edge in edges:
        corners = cv2.approxPolyDP(edge, coarse, True).reshape(-1, 2)
        if len(corners) > 2:
            points = _scaled(corners + 0.5, scale / grid)
            paths.append("M" + "L".join(f"{x:g} {y:g}" for x, y in points) + "Z")
    return "".join(paths)


def _with_label_maps(inputs: ReportInputs, record: dict[str, Any], _: float) -> Json:
    picture = _picture(inputs, record)
    size = picture.width, picture.height
    palette = _palette(inputs)
    truth = true_labels(record, inputs.metadata) if "sem_seg_file_name" in record else None
    shown: Json = {**_shown(picture), "found": {}}
    present: set[int] = set()
    for name, labels in [("", truth), *((n, maps.get(record["file_name"])) for n, maps in inputs.predictions.items())]:
        if labels is None:
            continue
        small = cv2.resize(labels.astype(np.int32), size, interpolation=cv2.INTER_NEAREST)
        present |= set(np.unique(small).tolist())
        drawn: Json = {"map": _label_picture(small, palette)}
        if name and truth is not None and truth.shape == labels.shape:
            counted, same = truth != NO_LABEL, labels == truth
            drawn["right"] = round(float((counted & same).sum() / max(counted.sum(), 1)), 4)
            judged = np.where(counted, np.where(same, 0, 1), 2).astype(np.int32)
            states = cv2.resize(judged, size, interpolation=cv2.INTER_NEAREST)
            drawn["errors"] = _label_picture(states, ERROR_COLORS, states == 0)
        if name:
            shown["found"][name] = drawn
        else:
            shown["truth"] = drawn
    return {**shown, "present": sorted(present - {NO_LABEL})}


def _label_picture(labels: np.ndarray, palette: np.ndarray, clear: np.ndarray | None = None) -> str:
    """A PNG with the color of every label, clear where there is none: at most 255 labels, the first ones."""
    clear = labels == NO_LABEL if clear is None else clear
    present = [label for label in np.unique(labels[~clear]).tolist() if label < len(palette)][:255]
    places = np.zeros(labels.shape, np.uint8)  # of the colors in the file; the first one is clear
    for place, label in enumerate(present, 1):
        places[labels == label] = place
    places[clear] = 0
    image = Image.fromarray(places, "P")
    image.putpalette(b"\0\0\0" + palette[present].astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=0, optimize=True)
    return _data_uri("png", buffer.getvalue())


def _with_classes(inputs: ReportInputs, record: dict[str, Any], _: float) -> Json:
    said = {}
    for name, answers in inputs.predictions.items():
        answer = answers.get(record["image_id"])
        if answer is not None:
            best = list(zip(answer.classes, answer.scores))[:5]
            said[name] = {"classes": [int(c) for c, _ in best], "scores": [round(float(s), 4) for _, s in best]}
    return {**_shown(_picture(inputs, record)), "truth": int(record["label"]), "found": said}


def _picture(inputs: ReportInputs, record: Mapping[str, Any]) -> Picture:
    side = MAX_SIDES[inputs.kind]
    image = detection_utils.read_image(record["file_name"], format="BGR")
    height, width = image.shape[:2]
    scale = min(1.0, side / max(height, width))
    if scale < 1:
        smaller = tuple(max(1, round(length * scale)) for length in (width, height))
        image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
    quality = 92 if max(image.shape) < SMALL else 82
    encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
    return Picture(_data_uri("jpeg", encoded), image.shape[0], image.shape[1], scale, (height, width))


def _shown(picture: Picture) -> Json:
    return {"source": picture.source, "width": picture.width, "height": picture.height}


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _scaled(points: Any, scale: float) -> list[list[float]]:
    return np.round(np.asarray(points, dtype=float).reshape(-1, 2) * scale, 1).tolist()


def _name(record: Mapping[str, Any]) -> str:
    """The file with its folder, which says more than a number."""
    path = Path(record["file_name"])
    return f"{path.parent.name}/{path.name}" if path.parent.name else path.name


def _class_names(inputs: ReportInputs) -> list[str]:
    if inputs.kind == "classes":
        return [str(name) for name in classes_said(inputs)]
    return [str(n) for n in inputs.metadata.get("stuff_classes" if inputs.kind == "label_maps" else "thing_classes")]


def _palette(inputs: ReportInputs) -> np.ndarray:
    """RGB of every label of a label map."""
    colors = inputs.metadata.get("stuff_colors")
    found = (
        class_colors(len(inputs.metadata.stuff_classes))[:, ::-1] if colors is None else np.asarray(colors, np.uint8)
    )
    return found.reshape(-1, 3)
