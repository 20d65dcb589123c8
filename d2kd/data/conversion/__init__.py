"""Formats of boxes and polygons that are read as COCO files: YOLO's text files, and Pascal VOC's XML."""

from .source import ConvertedSource
from .voc import VocAnnotations, use_of_difficult, voc_first_pixel, voc_split
from .yolo import YoloClasses, YoloLabels, yolo_classes

__all__ = [
    "ConvertedSource",
    "VocAnnotations",
    "YoloClasses",
    "YoloLabels",
    "use_of_difficult",
    "voc_first_pixel",
    "voc_split",
    "yolo_classes",
]
