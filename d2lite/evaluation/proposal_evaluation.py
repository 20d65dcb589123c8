"""Average recall of class-agnostic box proposals."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO

from d2lite.structures import Boxes, pairwise_iou

AREA_RANGES = {  # square pixels
    "all": (0, 1e10),
    "small": (0, 32**2),
    "medium": (32**2, 96**2),
    "large": (96**2, 1e10),
    "96-128": (96**2, 128**2),
    "128-256": (128**2, 256**2),
    "256-512": (256**2, 512**2),
    "512-inf": (512**2, 1e10),
}


def evaluate_box_proposals(
    dataset_predictions: Sequence[dict[str, Any]],
    coco_api: COCO,
    thresholds: Sequence[float] | None = None,
    area: str = "all",
    limit: int | None = None,
) -> dict[str, Any]:
    """Recall of ground-truth boxes, averaged over IoU thresholds (Hosang et al., arXiv:1502.05082).

    Args:
        dataset_predictions: per image `image_id` and `proposals`: Instances with `proposal_boxes` and
            `objectness_logits`.
        coco_api: the ground truth; crowds are left out.
        thresholds: IoU thresholds, 0.5:0.05:0.95 by default.
        area: counts the objects of this range of areas only, a key of AREA_RANGES.
        limit: the number of proposals per image that count, best first.

    Returns:
        `ar` in 0..1 (nan without objects), `recalls` (T,), `thresholds` (T,), `gt_overlaps`
        (objects,) sorted, `num_pos`.
    """
    smallest, largest = AREA_RANGES[area]
    overlaps = [torch.zeros(0)]
    num_objects = 0
    for prediction in dataset_predictions:
        annotations = coco_api.loadAnns(coco_api.getAnnIds(imgIds=prediction["image_id"]))
        objects = [a for a in annotations if a["iscrowd"] == 0 and smallest <= a["area"] <= largest]
        num_objects += len(objects)
        proposals = prediction["proposals"]
        if objects and len(proposals):
            order = proposals.objectness_logits.sort(descending=True, stable=True).indices[:limit]
            overlaps.append(_match(proposals.proposal_boxes[order], _boxes(objects)))
    covered = torch.cat(overlaps).sort().values
    thresholds = torch.arange(0.5, 0.95 + 1e-5, 0.05) if thresholds is None else torch.as_tensor(thresholds)
    hits = (covered[None, :] >= thresholds[:, None]).sum(1).float()
    recalls = hits / num_objects if num_objects else torch.full_like(hits, float("nan"))
    return {
        "ar": recalls.mean().item(),
        "recalls": recalls,
        "thresholds": thresholds,
        "gt_overlaps": covered,
        "num_pos": num_objects,
    }


def _boxes(objects: list[dict[str, Any]]) -> Boxes:
    xywh = np.array([a["bbox"] for a in objects], dtype=np.float32)
    return Boxes(torch.from_numpy(np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)))


def _match(proposals: Boxes, objects: Boxes) -> torch.Tensor:
    """IoU of each object with its proposal: pairs are made greedily, the best covered object first."""
    iou = pairwise_iou(proposals, objects)
    matched = torch.zeros(len(objects))
    for number in range(min(len(proposals), len(objects))):
        best, proposal_of = iou.max(dim=0)
        value, object_index = best.max(dim=0)
        matched[number] = value
        iou[proposal_of[object_index], :] = -1
        iou[:, object_index] = -1
    return matched
