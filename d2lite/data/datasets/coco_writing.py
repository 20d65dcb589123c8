"""Registered datasets as files in COCO's instance format, https://cocodataset.org/#format-data."""

import datetime
import logging
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from d2lite.data.catalog import DatasetCatalog, MetadataCatalog
from d2lite.structures import BoxMode, PolygonMasks
from d2lite.utils.file_io import PathManager
from d2lite.utils.output import write_json

__all__ = ["convert_to_coco_dict", "convert_to_coco_json"]

logger = logging.getLogger(__name__)


def convert_to_coco_dict(dataset_name: str) -> dict[str, Any]:
    """A registered dataset as the content of a COCO instances file.

    Class k becomes the category id that `thing_dataset_id_to_contiguous_id` maps to k, or k without a map.
    Areas come from the masks, or from the boxes where there are none.
    """
    dicts, meta = DatasetCatalog.get(dataset_name), MetadataCatalog.get(dataset_name)
    to_id = {v: k for k, v in meta.get("thing_dataset_id_to_contiguous_id", {}).items()}
    images, annotations = [], []
    for number, record in enumerate(dicts):
        image_id = record.get("image_id", number)
        size = {"width": int(record["width"]), "height": int(record["height"])}
        images.append({"id": image_id, **size, "file_name": str(record["file_name"])})
        for anno in record.get("annotations", []):
            category = anno["category_id"]
            converted = _to_coco_annotation(anno, size["height"], size["width"])
            converted.update(id=len(annotations) + 1, image_id=image_id, category_id=to_id.get(category, category))
            annotations.append(converted)
    logger.info("Converted %s to COCO format: %d images, %d annotations", dataset_name, len(images), len(annotations))
    return {
        "info": {
            "date_created": str(datetime.datetime.now()),
            "description": f"{dataset_name}, converted to COCO format",
        },
        "images": images,
        "categories": [{"id": to_id.get(k, k), "name": name} for k, name in enumerate(meta.thing_classes)],
        "licenses": None,
        "annotations": annotations,
    }


def _to_coco_annotation(anno: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """Box, area, crowd flag and segmentation of one annotation as COCO writes them."""
    mode = anno["bbox_mode"]
    box = [float(v) for v in anno["bbox"]]
    if mode != BoxMode.XYWHA_ABS:
        box = list(BoxMode.convert(box, mode, BoxMode.XYWH_ABS))
    out = {
        "bbox": [round(v, 3) for v in box],
        "area": box[2] * box[3],
        "iscrowd": int(anno.get("iscrowd", 0)),
    }
    segmentation = anno.get("segmentation")
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            segmentation = mask_util.frPyObjects(segmentation, height, width)
        counts = segmentation["counts"]
        out["area"] = float(mask_util.area(segmentation))
        text = counts if isinstance(counts, str) else counts.decode("ascii")
        out["segmentation"] = {"size": [int(v) for v in segmentation["size"]], "counts": text}
    elif segmentation is not None:
        polygons = [np.asarray(p, dtype=float) for p in segmentation]
        out["area"] = float(PolygonMasks([polygons]).area()[0])
        out["segmentation"] = [p.reshape(-1).tolist() for p in polygons]
    return out


def convert_to_coco_json(dataset_name: str, output_file: str, allow_cached: bool = True) -> None:
    """Writes a registered dataset as a COCO instances file.

    Args:
        dataset_name: its name in the catalogs.
        output_file: where to write.
        allow_cached: keep a file that is there already.
    """
    if PathManager.exists(output_file) and allow_cached:
        logger.warning("Using %s, which was there already; delete it if the dataset has changed", output_file)
        return
    write_json(output_file, convert_to_coco_dict(dataset_name))
