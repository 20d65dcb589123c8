"""Registration of COCO-format datasets, under the module name that many projects import it from."""

from d2lite.data.datasets.coco import register_coco_instances

__all__ = ["register_coco_instances"]
