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

__all__ = [
    "DatasetCatalog",
    "DatasetFromList",
    "DatasetMapper",
    "MapDataset",
    "Metadata",
    "MetadataCatalog",
    "ToIterableDataset",
    "build_batch_data_loader",
    "build_detection_test_loader",
    "build_detection_train_loader",
    "datasets",
    "get_detection_dataset_dicts",
    "print_instances_class_histogram",
    "samplers",
    "transforms",
]
