"""IoU-based box regression losses (arXiv 1911.08287)."""

from torch import Tensor
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss


def diou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """Distance-IoU loss: 1 - IoU + (center distance / diagonal of the enclosing box)^2.

    Args:
        boxes1, boxes2: (N, 4) in XYXY with x1 <= x2 and y1 <= y2.
        reduction: "none" for a loss of shape (N,), "mean" (0 when N is 0) or "sum".
        eps: keeps the divisions finite.
    """
    return distance_box_iou_loss(boxes1, boxes2, reduction, eps)


def ciou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """Complete-IoU loss: the distance-IoU loss plus a term for the difference of the aspect ratios.

    Arguments as for `diou_loss`.
    """
    return complete_box_iou_loss(boxes1, boxes2, reduction, eps)
