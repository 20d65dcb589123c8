"""PASCAL VOC's detection annotations: XML files beside the images."""

import os
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from functools import partial
from typing import Any

from d2lite.data.catalog import DatasetCatalog, MetadataCatalog
from d2lite.structures import BoxMode
from d2lite.utils.file_io import PathManager

CLASS_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def load_voc_instances(dirname: str, split: str, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Loads a split as dicts in Detectron2's standard format; "image_id" is the name of the image.

    Args:
        dirname: directory with Annotations, ImageSets and JPEGImages.
        split: "train", "val", "trainval" or "test".
        class_names: the classes, in the order of their numbers.

    Raises:
        ValueError: if an object has another class.
    """
    listing = os.path.join(dirname, "ImageSets", "Main", f"{split}.txt")
    with PathManager.open(listing) as f:
        names = [line.split()[0] for line in f if line.strip()]
    annotations = PathManager.get_local_path(os.path.join(dirname, "Annotations/"))
    number = {name: k for k, name in enumerate(class_names)}
    return [
        {
            "file_name": os.path.join(dirname, "JPEGImages", name + ".jpg"),
            "image_id": name,
            **_load_xml(os.path.join(annotations, name + ".xml"), number),
        }
        for name in names
    ]


def _load_xml(path: str, number: dict[str, int]) -> dict[str, Any]:
    """Size and annotations of one image."""
    with PathManager.open(path) as f:
        tree = ET.parse(f)
    annotations = []
    for item in tree.iterfind("object"):
        name = item.findtext("name")
        if name not in number:
            raise ValueError(f"{path}: class {name!r} is not one of {', '.join(number)}")
        x0, y0, x1, y1 = (float(item.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax"))
        # VOC counts pixels from 1 and includes the last one: only the start moves.
        box = [x0 - 1.0, y0 - 1.0, x1, y1]
        annotations.append({"category_id": number[name], "bbox": box, "bbox_mode": BoxMode.XYXY_ABS})
    size = tree.find("size")
    return {
        "height": int(size.findtext("height")),
        "width": int(size.findtext("width")),
        "annotations": annotations,
    }


def register_pascal_voc(
    name: str, dirname: str, split: str, year: int, class_names: Sequence[str] = CLASS_NAMES
) -> None:
    """Registers a split of PASCAL VOC; the arguments are as for `load_voc_instances`."""
    DatasetCatalog.register(name, partial(load_voc_instances, dirname, split, class_names))
    MetadataCatalog.get(name).set(thing_classes=list(class_names), dirname=dirname, year=year, split=split)
