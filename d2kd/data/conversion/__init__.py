"""Formats of boxes and polygons that are read as COCO files: YOLO's text files, and Pascal VOC's XML."""

from .source import ConvertedSource
from .voc import VocAnnotations, use_of_difficult, voc_first_pixel, voc_split
from .yolo import YoloLabels

__all__ = ["ConvertedSource", "VocAnnotations", "YoloLabels", "use_of_difficult", "voc_first_pixel", "voc_split"]
