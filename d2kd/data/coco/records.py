"""COCO files as datasets of Detectron2."""

import logging
import os
from collections import Counter, defaultdict
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from .image_files import find_image_files
from .reading import MAX_SIDE, CocoFile, id_order, read_coco, without_gc
from .segmentation import SegmentationError, as_runs, usable_segmentation

logger = logging.getLogger(__name__)

#: A dataset in Detectron2's standard format.
Records = list[dict[str, Any]]


@without_gc()
def load_coco(json_file: str, image_root: str, dataset_name: str) -> Records:
    """Loads a COCO instances file as records, ordered by image id; sets the class names in the dataset's metadata.

    Unlike Detectron2's loader, it keeps annotations whose segmentation cannot be used, as boxes.

    Raises:
        DatasetError: see `read_coco`.
    """
    file = read_coco(json_file, need_annotations=False)
    find_image_files(file, image_root)
    set_class_metadata(file, dataset_name)
    classes = MetadataCatalog.get(dataset_name).thing_dataset_id_to_contiguous_id
    sizes = {image["id"]: (image["height"], image["width"]) for image in file.images}
    by_image: dict[Any, Records] = defaultdict(list)
    unusable: Counter[str] = Counter()
    for annotation in file.annotations:
        record = _annotation_record(annotation, classes[annotation["category_id"]])
        if annotation.get("segmentation"):
            try:
                record["segmentation"] = _segmentation(annotation["segmentation"], *sizes[annotation["image_id"]])
            except SegmentationError as error:
                unusable[str(error)] += 1
        by_image[annotation["image_id"]].append(record)
    for reason, count in unusable.most_common(3):
        logger.info("%s: the segmentation of %d annotations %s; their boxes are used", json_file, count, reason)
    return [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": by_image[image["id"]],
        }
        for image in sorted(file.images, key=lambda image: id_order(image["id"]))
    ]


def set_class_metadata(file: CocoFile, dataset_name: str) -> None:
    """Sets names and ids of the classes of a dataset, as Detectron2's evaluators and predictors look for them."""
    ids = [category["id"] for category in file.sorted_categories()]
    MetadataCatalog.get(dataset_name).set(
        thing_classes=file.class_names, thing_dataset_id_to_contiguous_id={id: i for i, id in enumerate(ids)}
    )


def _annotation_record(annotation: dict[str, Any], category: int) -> dict[str, Any]:
    record = {
        "bbox": annotation["bbox"],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": category,
        "iscrowd": annotation["iscrowd"],
    }
    points = annotation.get("keypoints")
    if points and _are_keypoints(points):
        # COCO's key points are indices of pixels, Detectron2's positions: half a pixel further
        record["keypoints"] = [v + 0.5 if i % 3 < 2 else v for i, v in enumerate(points)]
    return record


def _are_keypoints(value: Any) -> bool:
    # [x, y, visibility, ...]; infinite and NaN compare as false
    return (
        isinstance(value, list)
        and len(value) % 3 == 0
        and all(type(v) in (int, float) and abs(v) <= MAX_SIDE for v in value)
    )


def _segmentation(value: Any, height: int, width: int) -> Any:
    value = usable_segmentation(value, height, width)
    return as_runs(value, height, width) if isinstance(value, dict) else value
