"""COCO's evaluation protocol: faster-coco-eval where it is installed, else pycocotools; same numbers."""

try:
    from faster_coco_eval import COCOeval_faster as COCOeval_opt
except ImportError:
    from pycocotools.cocoeval import COCOeval as COCOeval_opt

__all__ = ["COCOeval_opt"]
