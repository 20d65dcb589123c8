"""COCO's instance format: loading and registering. Also directories of label maps.

Format: https://cocodataset.org/#format-data
"""

import contextlib
import gc
import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import pycocotools.mask as mask_util

from d2lite.data.catalog import DatasetCatalog, MetadataCatalog
from d2lite.data.datasets.coco_writing import convert_to_coco_dict, convert_to_coco_json
from d2lite.structures import BoxMode
from d2lite.utils.file_io import PathManager

__all__ = [
    "load_coco_json",
    "load_sem_seg",
    "convert_to_coco_dict",
    "convert_to_coco_json",
    "register_coco_instances",
]

logger = logging.getLogger(__name__)

Dicts = list[dict[str, Any]]


def load_coco_json(
    json_file: str,
    image_root: str,
    dataset_name: str | None = None,
    extra_annotation_keys: Sequence[str] | None = None,
) -> Dicts:
    """Loads a COCO instances file as a list of dicts in Detectron2's standard format, ordered by image id.

    Args:
        json_file: the annotations.
        image_root: directory that the file names are relative to.
        dataset_name: if given, its metadata gets `thing_classes` and `thing_dataset_id_to_contiguous_id`, and
            the category ids are mapped to 0, 1, ... in the order of the ids; when None they stay.
        extra_annotation_keys: annotation entries to keep besides iscrowd, bbox, segmentation, category_id.

    Raises:
        AssertionError: if annotation ids are not unique.
        KeyError: if an annotation's category is not listed.
        ValueError: if a box is empty.
    """
    with PathManager.open(json_file, "rb") as f, _without_gc():  # bytes, of which JSON tells the encoding
        content = json.load(f)
        id_map = _set_class_metadata(dataset_name, content["categories"]) if dataset_name is not None else None
        images = {image["id"]: image for image in content["images"]}
        annotations = content.get("annotations", [])
        _check_annotation_ids(json_file, annotations)
        by_image = _annotations_by_image(annotations, images, id_map, ["iscrowd", *(extra_annotation_keys or [])])
    logger.info("Loaded %d images in COCO format from %s", len(images), json_file)
    return [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image_id,
            "annotations": by_image[image_id],
        }
        for image_id, image in sorted(images.items())
    ]


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    """Switches the garbage collector off: it would scan millions of new objects repeatedly."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _set_class_metadata(dataset_name: str, categories: Dicts) -> dict[int, int]:
    """Sets the class names of a dataset; returns the map from category id to 0, 1, ..."""
    categories = sorted(categories, key=lambda c: c["id"])
    id_map = {c["id"]: i for i, c in enumerate(categories)}
    meta = MetadataCatalog.get(dataset_name)
    meta.thing_classes = [c["name"] for c in categories]
    meta.thing_dataset_id_to_contiguous_id = id_map
    if list(id_map) != list(range(1, len(id_map) + 1)) and "coco" not in dataset_name:
        logger.warning("Category ids of %s are not 1 to %d; they are mapped to 0, 1, ...", dataset_name, len(id_map))
    return id_map


def _check_annotation_ids(json_file: str, annotations: Dicts) -> None:
    # Ids are repeated in COCO's own 2014 minival files.
    if annotations and "id" in annotations[0] and "minival" not in json_file:
        ids = [a["id"] for a in annotations]
        assert len(set(ids)) == len(ids), f"annotation ids in {json_file} are not unique"


def _annotations_by_image(
    annotations: Dicts, images: dict[Any, Any], id_map: dict[int, int] | None, keys: Sequence[str]
) -> dict[Any, Dicts]:
    """Image id to its annotations, in the order of the file."""
    by_image: dict[Any, Dicts] = defaultdict(list)
    without_image = invalid = 0
    for anno in annotations:
        image_id = anno["image_id"]
        if image_id not in images:
            without_image += 1
            continue
        converted = _convert_annotation(anno, id_map, keys)
        if converted is None:
            invalid += 1
        else:
            by_image[image_id].append(converted)
    if without_image:
        logger.warning("Ignored %d of %d annotations: their images are not listed", without_image, len(annotations))
    if invalid:
        logger.warning(
            "Dropped %d of %d annotations: no valid polygon in their segmentation", invalid, len(annotations)
        )
    return by_image


def _convert_annotation(
    anno: dict[str, Any], id_map: dict[int, int] | None, keys: Sequence[str]
) -> dict[str, Any] | None:
    """One annotation in the standard format; None if it has a segmentation without a valid polygon."""
    assert anno.get("ignore", 0) == 0, f'"ignore" is not supported (annotation {anno.get("id")})'
    obj = {k: anno[k] for k in keys if k in anno}
    if "bbox" in anno:
        if not anno["bbox"]:
            raise ValueError(f"annotation {anno.get('id')} of image {anno['image_id']} has an empty bbox")
        obj["bbox"] = anno["bbox"]
    segmentation = anno.get("segmentation")
    if segmentation:
        segmentation = _valid_segmentation(segmentation)
        if not segmentation:
            return None
        obj["segmentation"] = segmentation
    obj["bbox_mode"] = BoxMode.XYWH_ABS
    category = anno["category_id"]
    if id_map is not None and category not in id_map:
        raise KeyError(
            f"category_id {category} of annotation {anno.get('id')} (image {anno['image_id']}) is not listed "
            f"among the categories of the file ({len(id_map)} ids: {sorted(id_map)[:10]}...)"
        )
    obj["category_id"] = category if id_map is None else id_map[category]
    return obj


def _valid_segmentation(segmentation: Any) -> Any:
    """RLE in compressed form; the polygons of at least three points and an even number of coordinates."""
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            return mask_util.frPyObjects(segmentation, *segmentation["size"])
        return segmentation
    return [p for p in segmentation if len(p) % 2 == 0 and len(p) >= 6]


def register_coco_instances(name: str, metadata: dict[str, Any], json_file: str, image_root: str) -> None:
    """Registers a dataset in COCO's instances format.

    Args:
        name: its name in the catalogs.
        metadata: extra metadata, may be empty.
        json_file: the annotations.
        image_root: directory of the images.
    """
    assert isinstance(name, str), f"the name of a dataset is a str, got {type(name).__name__}"
    for path in (json_file, image_root):
        assert isinstance(path, (str, os.PathLike)), f"expected a path, got {type(path).__name__}"
    DatasetCatalog.register(name, lambda: load_coco_json(json_file, image_root, name))
    MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root, evaluator_type="coco", **metadata)


# --- Label maps -----------------------------------------------------------------------------------


def load_sem_seg(gt_root: str, image_root: str, gt_ext: str = "png", image_ext: str = "jpg") -> Dicts:
    """Pairs images with label maps of the same relative path.

    Args:
        gt_root: directory of the label maps: one channel, the pixel value is the class.
        image_root: directory of the images.
        gt_ext, image_ext: file extensions.

    Returns:
        Dicts with "file_name" and "sem_seg_file_name", ordered by path.
    """
    images, labels = _files_by_stem(image_root, image_ext), _files_by_stem(gt_root, gt_ext)
    assert labels, f"no .{gt_ext} label map in {gt_root}"
    pairs = sorted(images.keys() & labels.keys())
    if len(images) != len(labels) or len(pairs) != len(images):
        logger.warning(
            "%s has %d images and %s %d label maps; the %d that have both are used",
            image_root,
            len(images),
            gt_root,
            len(labels),
            len(pairs),
        )
    logger.info("Loaded %d images with label maps from %s", len(pairs), image_root)
    return [{"file_name": images[p], "sem_seg_file_name": labels[p]} for p in pairs]


def _files_by_stem(root: str, extension: str) -> dict[str, str]:
    """Path relative to `root`, without extension, to the full path, of the files with an extension."""
    found = {}
    local = PathManager.get_local_path(root)
    for directory, _, names in os.walk(local):
        for name in names:
            if name.endswith("." + extension):
                path = os.path.join(directory, name)
                found[os.path.relpath(path, local)[: -len(extension) - 1]] = path
    return found
