"""Loaders and registration of datasets, and the built-in ones."""

from d2lite.data.datasets import builtin as _builtin  # noqa: F401  (registers them)
from d2lite.data.datasets.cityscapes import load_cityscapes_instances, load_cityscapes_semantic
from d2lite.data.datasets.coco import (
    convert_to_coco_dict,
    convert_to_coco_json,
    load_coco_json,
    load_sem_seg,
    register_coco_instances,
)
from d2lite.data.datasets.pascal_voc import load_voc_instances, register_pascal_voc

__all__ = [
    "convert_to_coco_dict",
    "convert_to_coco_json",
    "load_cityscapes_instances",
    "load_cityscapes_semantic",
    "load_coco_json",
    "load_sem_seg",
    "load_voc_instances",
    "register_coco_instances",
    "register_pascal_voc",
]
