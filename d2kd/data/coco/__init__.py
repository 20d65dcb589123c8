"""COCO annotation files: read alike for training and evaluation, checked before any training time is spent."""

from .check import CocoSummary, area_of, validate_coco_json
from .reading import CocoFile, DatasetError, parse_coco, read_coco, short
from .records import load_coco
from .segmentation import SegmentationError, as_runs, usable_segmentation

__all__ = [
    "CocoFile",
    "CocoSummary",
    "DatasetError",
    "SegmentationError",
    "area_of",
    "as_runs",
    "load_coco",
    "parse_coco",
    "read_coco",
    "short",
    "usable_segmentation",
    "validate_coco_json",
]
