"""Detections from the predictions for regions."""

from torch import Tensor

from d2lite.layers import batched_nms
from d2lite.structures import Boxes, Instances


def fast_rcnn_inference(
    boxes: list[Tensor],
    scores: list[Tensor],
    image_shapes: list[tuple[int, int]],
    score_thresh: float,
    nms_thresh: float,
    topk_per_image: int,
) -> tuple[list[Instances], list[Tensor]]:
    """Detections of each image: scores above a threshold, non-maximum suppression per class, the best ones.
    Predictions that are not finite are dropped.

    Args:
        boxes: N tensors (R_i, 4 * K) or (R_i, 4), XYXY in pixels.
        scores: N tensors (R_i, K + 1), the background last.
        image_shapes: (height, width) of the N images.
        score_thresh: detections need a higher score than this.
        nms_thresh: IoU above which the lower score of the same class is suppressed.
        topk_per_image: maximum number of detections per image; negative: all.

    Returns:
        N `Instances` with `pred_boxes`, `scores` and `pred_classes`, by descending score; and for each the
        index (D_i,) of the region, among those with finite predictions, that every detection came from.
    """
    results = [
        fast_rcnn_inference_single_image(b, s, shape, score_thresh, nms_thresh, topk_per_image)
        for b, s, shape in zip(boxes, scores, image_shapes)
    ]
    return [x[0] for x in results], [x[1] for x in results]


def fast_rcnn_inference_single_image(
    boxes: Tensor,
    scores: Tensor,
    image_shape: tuple[int, int],
    score_thresh: float,
    nms_thresh: float,
    topk_per_image: int,
) -> tuple[Instances, Tensor]:
    """As `fast_rcnn_inference`, for one image."""
    finite = boxes.isfinite().all(dim=1) & scores.isfinite().all(dim=1)
    foreground = scores[:, :-1]
    region, classes = (finite[:, None] & (foreground > score_thresh)).nonzero(as_tuple=True)
    scores = foreground[region, classes]
    if boxes.shape[1] == 4:
        candidates = Boxes(boxes[region])
    else:
        candidates = Boxes(boxes.unflatten(1, (-1, 4))[region, classes])
    candidates.clip(image_shape)

    keep = batched_nms(candidates.tensor, scores, classes, nms_thresh)
    if topk_per_image >= 0:
        keep = keep[:topk_per_image]
    result = Instances(image_shape, pred_boxes=candidates[keep], scores=scores[keep], pred_classes=classes[keep])
    return result, (finite.cumsum(0) - 1)[region[keep]]
