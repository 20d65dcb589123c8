"""Registers ImageNet-1K and CUB-200-2011 under the directory DETECTRON2_DATASETS (default: datasets)."""

import os

from detectron2.data import DatasetCatalog, MetadataCatalog

from .cub import SPLITS, Cub200
from .folders import ImageFolders
from .source import ClassificationSource


def register_source(source: ClassificationSource, image_root: str) -> None:
    """Registers a classification dataset in Detectron2's catalogs, under its own name.

    Args:
        source: that reads it.
        image_root: folder of its images.
    """
    DatasetCatalog.register(source.name, source)
    MetadataCatalog.get(source.name).set(image_root=image_root, evaluator_type="classification")


def register_builtin(root: str) -> None:
    """Registers `imagenet_train`, `imagenet_val`, `cub200_train` and `cub200_test`; files need not be there.

    Args:
        root: holds imagenet/{train,val}/<class>/ and CUB_200_2011/, as the archives have them.
    """
    for split in ("train", "val"):
        folder = os.path.join(root, "imagenet", split)
        register_source(ImageFolders(f"imagenet_{split}", folder), folder)
    for split in SPLITS:
        folder = os.path.join(root, "CUB_200_2011")
        register_source(Cub200(f"cub200_{split}", folder, split), os.path.join(folder, "images"))
