"""Cityscapes: label maps for semantic segmentation, and instances from its polygons or its instance maps.

Format: https://github.com/mcordts/cityscapesScripts
"""

import json
import logging
import os
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

from d2lite.data.datasets.builtin_meta import CITYSCAPES_THING_CLASSES, CITYSCAPES_THING_IDS
from d2lite.structures import BoxMode
from d2lite.utils.file_io import PathManager

__all__ = ["load_cityscapes_instances", "load_cityscapes_semantic"]

logger = logging.getLogger(__name__)

Dicts = list[dict[str, Any]]

_IMAGE_SUFFIX = "leftImg8bit.png"
_CLASS_OF_NAME = {name: k for k, name in enumerate(CITYSCAPES_THING_CLASSES)}
_CLASS_OF_LABEL = {label: k for k, label in enumerate(CITYSCAPES_THING_IDS.values())}


def load_cityscapes_semantic(image_dir: str, gt_dir: str) -> Dicts:
    """Pairs images with their *_gtFine_labelTrainIds.png.

    Args:
        image_dir: e.g. "leftImg8bit/train".
        gt_dir: e.g. "gtFine/train".

    Returns:
        Dicts with "file_name", "sem_seg_file_name", "height" and "width".

    Raises:
        FileNotFoundError: if a label map is missing.
    """
    out = []
    for image, label in _files(image_dir, gt_dir, "gtFine_labelTrainIds.png"):
        if not PathManager.isfile(label):
            raise FileNotFoundError(
                f"{label} is missing; make these files with createTrainIdLabelImgs.py of cityscapesscripts"
            )
        # Opening reads the header only.
        with PathManager.open(label, "rb") as f, Image.open(f) as header:
            width, height = header.size
        out.append({"file_name": image, "sem_seg_file_name": label, "height": height, "width": width})
    return out


def load_cityscapes_instances(image_dir: str, gt_dir: str, from_json: bool = True, to_polygons: bool = True) -> Dicts:
    """Loads the instances of the eight classes that have them; groups become crowd annotations.

    Args:
        image_dir: e.g. "leftImg8bit/train".
        gt_dir: e.g. "gtFine/train".
        from_json: read *_gtFine_polygons.json; False reads *_gtFine_instanceIds.png.
        to_polygons: give polygons (from JSON only); False gives RLE.

    Returns:
        Dicts in Detectron2's standard format.
    """
    if to_polygons and not from_json:
        raise ValueError("instance maps have no polygons: with from_json=False set to_polygons=False as well")
    suffix = "gtFine_polygons.json" if from_json else "gtFine_instanceIds.png"
    out = []
    for image, label in _files(image_dir, gt_dir, suffix):
        record = _from_polygons(label, to_polygons) if from_json else _from_instance_map(label)
        out.append({"file_name": image, "image_id": os.path.basename(image), **record})
    logger.info("Loaded the instances of %d images from %s", len(out), image_dir)
    return out


def _files(image_dir: str, gt_dir: str, suffix: str) -> list[tuple[str, str]]:
    """Images with the ground truth file of the given suffix, in the order of cities and names."""
    files = []
    for city in sorted(PathManager.ls(image_dir)):
        for name in sorted(PathManager.ls(os.path.join(image_dir, city))):
            if name.endswith(_IMAGE_SUFFIX):
                label = os.path.join(gt_dir, city, name[: -len(_IMAGE_SUFFIX)] + suffix)
                files.append((os.path.join(image_dir, city, name), label))
    assert files, f"no *_{_IMAGE_SUFFIX} in the directories of {image_dir}"
    return files


def _from_polygons(label_file: str, to_polygons: bool) -> dict[str, Any]:
    """Size and annotations from a polygon file. Its later objects lie over the earlier ones."""
    try:
        from shapely.geometry import Polygon
        from shapely.ops import unary_union
    except ImportError as error:
        raise ImportError(
            "The polygons of Cityscapes need shapely, d2kd's extra 'cityscapes': pip install shapely"
        ) from error

    with PathManager.open(label_file, "r") as f:
        content = json.load(f)
    height, width = content["imgHeight"], content["imgWidth"]
    above, annotations = [], []
    for obj in reversed(content["objects"]):
        label = obj["label"]
        is_group = label.endswith("group")
        name = label[: -len("group")] if is_group else label
        shape = Polygon(obj["polygon"]).buffer(0.0) if len(obj["polygon"]) >= 3 else Polygon()
        if obj.get("deleted") or shape.is_empty:
            continue
        if name in _CLASS_OF_NAME:
            visible = shape.difference(unary_union(above)) if above else shape
            parts = [p for p in getattr(visible, "geoms", [visible]) if isinstance(p, Polygon) and not p.is_empty]
            # The last point repeats the first.
            polygons = [np.asarray(p.exterior.coords)[:-1].reshape(-1).tolist() for p in parts]
            if polygons:
                annotations.append(_annotation(_CLASS_OF_NAME[name], is_group, visible.bounds, polygons))
        above.append(shape)
    annotations.reverse()
    if not to_polygons:
        for anno in annotations:
            rles = mask_util.frPyObjects(anno["segmentation"], height, width)
            anno["segmentation"] = mask_util.merge(rles)
    return {"height": height, "width": width, "annotations": annotations}


def _from_instance_map(label_file: str) -> dict[str, Any]:
    """Size and annotations from an instance map: label id * 1000 + number, or the label id for groups."""
    with PathManager.open(label_file, "rb") as f:
        ids = np.asarray(Image.open(f))
    annotations = []
    for instance in np.unique(ids).tolist():
        label = instance // 1000 if instance >= 1000 else instance
        if label not in _CLASS_OF_LABEL:
            continue
        mask = ids == instance
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1)
        rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
        annotations.append(_annotation(_CLASS_OF_LABEL[label], instance < 1000, box, rle))
    return {"height": ids.shape[0], "width": ids.shape[1], "annotations": annotations}


def _annotation(category: int, is_crowd: bool, box: tuple[float, ...], segmentation: Any) -> dict[str, Any]:
    return {
        "category_id": category,
        "iscrowd": int(is_crowd),
        "bbox": [float(v) for v in box],
        "bbox_mode": BoxMode.XYXY_ABS,
        "segmentation": segmentation,
    }
