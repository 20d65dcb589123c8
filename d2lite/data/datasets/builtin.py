"""Registers COCO, Cityscapes and PASCAL VOC under the directory DETECTRON2_DATASETS (default: datasets)."""

import os
from functools import partial

from d2lite.data.catalog import DatasetCatalog, MetadataCatalog
from d2lite.data.datasets.builtin_meta import _get_builtin_metadata
from d2lite.data.datasets.cityscapes import load_cityscapes_instances, load_cityscapes_semantic
from d2lite.data.datasets.coco import register_coco_instances
from d2lite.data.datasets.pascal_voc import register_pascal_voc

# (year, folder of images) -> the splits with images in it
_COCO = {
    (2014, "train"): ("train",),
    (2014, "val"): ("val", "minival", "valminusminival"),
    (2017, "train"): ("train",),
    (2017, "val"): ("val", "val_100"),
    (2017, "test"): ("test", "test-dev"),
}


def register_all_coco(root: str) -> None:
    """Registers COCO's 2014 and 2017 instance splits under `root`/coco."""
    coco = os.path.join(root, "coco")
    for (year, folder), splits in _COCO.items():
        kind = "image_info" if folder == "test" else "instances"
        for split in splits:
            part, *size = split.split("_")
            json_file = os.path.join(coco, "annotations", "_".join([kind, f"{part}{year}", *size]) + ".json")
            metadata = _get_builtin_metadata("coco")
            register_coco_instances(f"coco_{year}_{split}", metadata, json_file, os.path.join(coco, f"{folder}{year}"))


def register_all_cityscapes(root: str) -> None:
    """Registers Cityscapes' fine splits, for instances and for label maps, under `root`/cityscapes."""
    metadata = _get_builtin_metadata("cityscapes")
    for split in ("train", "val", "test"):
        images = os.path.join(root, "cityscapes/leftImg8bit", split)
        labels = os.path.join(root, "cityscapes/gtFine", split)
        for task, load, evaluator, extra in (
            ("instance_seg", load_cityscapes_instances, "cityscapes_instance", {}),
            ("sem_seg", load_cityscapes_semantic, "cityscapes_sem_seg", {"ignore_label": 255}),
        ):
            name = f"cityscapes_fine_{task}_{split}"
            properties = {"image_dir": images, "gt_dir": labels, "evaluator_type": evaluator, **extra, **metadata}
            DatasetCatalog.register(name, partial(load, images, labels))
            MetadataCatalog.get(name).set(**properties)


def register_all_pascal_voc(root: str) -> None:
    """Registers the detection splits of PASCAL VOC 2007 and 2012 under `root`/VOC2007 and `root`/VOC2012."""
    for year, splits in ((2007, ("trainval", "train", "val", "test")), (2012, ("trainval", "train", "val"))):
        for split in splits:
            name = f"voc_{year}_{split}"
            register_pascal_voc(name, os.path.join(root, f"VOC{year}"), split, year)
            MetadataCatalog.get(name).set(evaluator_type="pascal_voc")


for _register in (register_all_coco, register_all_cityscapes, register_all_pascal_voc):
    _register(os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets")))
