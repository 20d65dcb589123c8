"""COCO's evaluation protocol: faster-coco-eval where it is installed, else pycocotools; same numbers."""

import copy
from typing import Any

from pycocotools.coco import COCO

try:
    import faster_coco_eval
except ImportError:
    from pycocotools.cocoeval import COCOeval as COCOeval_opt
else:

    class COCOeval_opt(faster_coco_eval.COCOeval_faster):
        """Evaluates detections; takes datasets of pycocotools as well as those of faster-coco-eval."""

        def __init__(
            self, cocoGt: COCO | None = None, cocoDt: COCO | None = None, iouType: str = "segm", **kwargs: Any
        ) -> None:
            """
            Args:
                cocoGt: the ground truth.
                cocoDt: the detections, as `cocoGt.loadRes` gives them.
                iouType: "bbox", "segm" or "keypoints".
                kwargs: as for faster-coco-eval.
            """
            super().__init__(_with_faster_index(cocoGt), _with_faster_index(cocoDt), iouType, **kwargs)


def _with_faster_index(data: COCO | None) -> Any:
    if data is None or isinstance(data, faster_coco_eval.COCO):
        return data
    converted = faster_coco_eval.COCO()
    # the index and the evaluation replace entries of annotations, and change none in place
    converted.dataset = {
        key: [copy.copy(entry) for entry in section] if isinstance(section, list) else section
        for key, section in data.dataset.items()
    }
    converted.createIndex()
    return converted


__all__ = ["COCOeval_opt"]
