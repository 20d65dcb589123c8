"""Registers COCO, Cityscapes and PASCAL VOC under the directory DETECTRON2_DATASETS (default: datasets)."""

import os

from d2lite.data.catalog import DatasetCatalog, MetadataCatalog
from d2lite.data.datasets.builtin_meta import _get_builtin_metadata
from d2lite.data.datasets.cityscapes import load_cityscapes_instances, load_cityscapes_semantic
from d2lite.data.datasets.coco import register_coco_instances
from d2lite.data.datasets.pascal_voc import register_pascal_voc

# name -> (images, annotations), relative to the root
_COCO = {
    "coco_2014_train": ("coco/train2014", "coco/annotations/instances_train2014.json"),
    "coco_2014_val": ("coco/val2014", "coco/annotations/instances_val2014.json"),
    "coco_2014_minival": ("coco/val2014", "coco/annotations/instances_minival2014.json"),
    "coco_2014_valminusminival": ("coco/val2014", "coco/annotations/instances_valminusminival2014.json"),
    "coco_2017_train": ("coco/train2017", "coco/annotations/instances_train2017.json"),
    "coco_2017_val": ("coco/val2017", "coco/annotations/instances_val2017.json"),
    "coco_2017_test": ("coco/test2017", "coco/annotations/image_info_test2017.json"),
    "coco_2017_test-dev": ("coco/test2017", "coco/annotations/image_info_test-dev2017.json"),
    "coco_2017_val_100": ("coco/val2017", "coco/annotations/instances_val2017_100.json"),
}


def register_all_coco(root: str) -> None:
    """Registers COCO's 2014 and 2017 instance splits under `root`/coco."""
    for name, (images, annotations) in _COCO.items():
        metadata = _get_builtin_metadata("coco")
        register_coco_instances(name, metadata, os.path.join(root, annotations), os.path.join(root, images))


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
            DatasetCatalog.register(name, lambda load=load, images=images, labels=labels: load(images, labels))
            MetadataCatalog.get(name).set(
                image_dir=images, gt_dir=labels, evaluator_type=evaluator, **extra, **metadata
            )


def register_all_pascal_voc(root: str) -> None:
    """Registers the detection splits of PASCAL VOC 2007 and 2012 under `root`/VOC2007 and `root`/VOC2012."""
    for year, splits in ((2007, ("trainval", "train", "val", "test")), (2012, ("trainval", "train", "val"))):
        for split in splits:
            name = f"voc_{year}_{split}"
            register_pascal_voc(name, os.path.join(root, f"VOC{year}"), split, year)
            MetadataCatalog.get(name).evaluator_type = "pascal_voc"


_root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
register_all_coco(_root)
register_all_cityscapes(_root)
register_all_pascal_voc(_root)
