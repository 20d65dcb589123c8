"""Datasets, augmentation and data loaders."""

from d2lite.data import datasets, samplers, transforms
from d2lite.data.build import (
    build_batch_data_loader,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
    print_instances_class_histogram,
)
from d2lite.data.catalog import DatasetCatalog, Metadata, MetadataCatalog
from d2lite.data.common import DatasetFromList, MapDataset, ToIterableDataset
from d2lite.data.dataset_mapper import DatasetMapper

__all__ = ["datasets", "samplers", "transforms"]
# what is known by name, and its properties
__all__ += ["DatasetCatalog", "Metadata", "MetadataCatalog"]
# from the annotations of an image to the input of a model
__all__ += ["get_detection_dataset_dicts", "print_instances_class_histogram", "DatasetMapper"]
__all__ += ["DatasetFromList", "MapDataset", "ToIterableDataset"]
__all__ += ["build_batch_data_loader", "build_detection_train_loader", "build_detection_test_loader"]
