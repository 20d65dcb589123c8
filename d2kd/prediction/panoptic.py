"""Merged maps of things and stuff, as Panoptic FPN gives them, in COCO's panoptic format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .classes import ClassList, numbered


@dataclass(frozen=True)
class PanopticMap:
    """Which segment every pixel belongs to.

    Attributes:
        ids: int (H, W); 0 for pixels of no segment.
        segments: for each its `id`, `isthing`, the model's class as `category_id` (among things or among stuff), and
            for things a `score`.
    """

    ids: np.ndarray
    segments: list[dict[str, Any]]


def read_panoptic(output: Mapping[str, Any]) -> PanopticMap | None:
    """Turns Detectron2's output for one image into a `PanopticMap`.

    Returns:
        None where there is no "panoptic_seg", or one that lists no segments (Panoptic-DeepLab's, whose ids only its
        dataset explains).
    """
    ids, segments = output.get("panoptic_seg", (None, None))
    if ids is None or segments is None:
        return None
    kept = ("id", "isthing", "category_id", "score")
    return PanopticMap(
        ids.cpu().numpy().astype(np.int32), [{key: s[key] for key in kept if key in s} for s in segments]
    )


def id_picture(ids: np.ndarray) -> np.ndarray:
    """Returns the colors that COCO's panoptic format gives to ids, id = R + 256 G + 65536 B: uint8 (H, W, 3) BGR."""
    return np.stack([ids >> 16 & 255, ids >> 8 & 255, ids & 255], axis=-1).astype(np.uint8)


def annotation(image_id: int, file_name: str, panoptic: PanopticMap) -> dict[str, Any]:
    """Returns the entry of an image, with the model's classes as `category_id`; segments without a pixel are left out.

    Args:
        image_id: of the image.
        file_name: of its picture of ids, in the folder of these.
        panoptic: its map.
    """
    entries = []
    for segment in panoptic.segments:
        inside = panoptic.ids == segment["id"]
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        if not len(rows):
            continue
        left, top = int(columns[0]), int(rows[0])
        box = [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]
        entries.append({**segment, "area": int(inside.sum()), "bbox": box, "iscrowd": 0})
    return {"image_id": image_id, "file_name": file_name, "segments_info": entries}


def panoptic_file(
    images: Sequence[Mapping[str, Any]],
    annotations: Sequence[Mapping[str, Any]],
    classes: Mapping[str, ClassList],
) -> dict[str, Any]:
    """Returns the content of a file in COCO's panoptic format.

    Things and stuff share the ids of categories there: where those of the classes overlap, stuff goes behind things.

    Args:
        images: that have an annotation among others.
        annotations: see `annotation`.
        classes: names and ids by kind.
    """
    things, stuff = classes.get("thing_classes", numbered(0)), classes.get("stuff_classes", numbered(0))
    stuff_ids = list(stuff.ids)
    if set(stuff_ids) & set(things.ids):
        stuff_ids = [max(things.ids) + 1 + place for place in range(len(stuff.names))]
    ids = {True: list(things.ids), False: stuff_ids}
    categories = [
        {"id": number, "name": name, "isthing": int(isthing)}
        for isthing, known in ((True, things), (False, stuff))
        for number, name in zip(ids[isthing], known.names)
    ]
    entries = [
        {
            **entry,
            "segments_info": [
                {**{k: v for k, v in s.items() if k != "isthing"}, "category_id": ids[s["isthing"]][s["category_id"]]}
                for s in entry["segments_info"]
            ],
        }
        for entry in annotations
    ]
    known = {entry["image_id"] for entry in annotations}
    return {"images": [i for i in images if i["id"] in known], "annotations": entries, "categories": categories}
