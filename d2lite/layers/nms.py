"""Non-maximum suppression, plain and per class."""

from torch import Tensor
from torchvision.ops import boxes as box_ops
from torchvision.ops import nms

__all__ = ["batched_nms", "nms"]


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Suppresses, within each group of equal `idxs`, the boxes that overlap a better one.

    Args:
        boxes: (N, 4) in XYXY. Always compared in float32, because half precision does not
            resolve the coordinates that separate the groups.
        scores: (N,), compared in float32.
        idxs: (N,) group (class or level) of each box.
        iou_threshold: boxes with a larger IoU than this are suppressed; 0 to 1.

    Returns:
        (K,) int64 indices of the boxes kept, by descending score.
    """
    assert boxes.shape[-1] == 4, "batched_nms() needs boxes of shape (N, 4) in XYXY"
    return box_ops.batched_nms(boxes.float(), scores.float(), idxs, iou_threshold)
