"""Registers label maps of a PhotoDigits, whose folder D2KD_TEST_DIGITS names, as digit_labels_train and _val."""

import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_sem_seg

for split in ("train", "val"):
    labels, images = (os.path.join(os.environ["D2KD_TEST_DIGITS"], name) for name in (f"semseg_{split}", split))
    name = f"digit_labels_{split}"
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, lambda folders=(labels, images): load_sem_seg(*folders, "png", "png"))
        MetadataCatalog.get(name).set(
            evaluator_type="sem_seg",
            stuff_classes=["ground", *map(str, range(10))],
            ignore_label=255,
            sem_seg_root=labels,
        )
