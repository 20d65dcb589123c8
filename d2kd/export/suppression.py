"""Non-maximum suppression of a batch as a graph: torchvision's in TorchScript, the operator of that name in ONNX."""

from typing import Any

import torch
from torch import Tensor
from torchvision.ops import batched_nms

#: Score of what is no candidate: places that a graph must have, since their number is not that of the candidates.
NOTHING = -1e9
#: A threshold that admits all candidates.
ALL = -1e8


def suppressed(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    num_groups: int,
    score_threshold: float,
    overlap: float,
    limit: int,
    for_onnx: bool,
) -> tuple[Tensor, Tensor]:
    """Returns which candidates are detections, as Detectron2's `batched_nms` of each image decides.

    Args:
        boxes: (N, C, 4) candidates of N images, in XYXY, float32.
        scores: (N, C); `NOTHING` where there is no candidate.
        groups: (N, C) classes; only boxes of one class suppress each other.
        num_groups: classes.
        score_threshold: only candidates above it count.
        overlap: intersection over union above which the weaker of two boxes is suppressed.
        limit: detections of an image.
        for_onnx: see above.

    Returns:
        (D,) images, and (D,) candidates: by image, in each by decreasing score.
    """
    if not for_onnx:
        found: tuple[Tensor, Tensor] = _in_torchscript(boxes, scores, groups, score_threshold, overlap, limit)
        return found
    of_class = groups[:, None] == torch.arange(num_groups, device=groups.device)[None, :, None]
    # the operator takes a score of every box for every class: each candidate is of one
    by_class = torch.where(of_class, scores[:, None], scores.new_full((), NOTHING))
    chosen = _NonMaxSuppression.apply(boxes, by_class, limit, overlap, score_threshold)
    images, candidates = chosen[:, 0], chosen[:, 2]
    order = best_of_images(images, scores[images, candidates], boxes.shape[0], limit)
    return images[order], candidates[order]


def suppressed_by_class(
    boxes: Tensor, scores: Tensor, score_threshold: float, overlap: float, limit: int, for_onnx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `suppressed`, where each of R regions is a candidate of every class.

    Args:
        boxes: (N, R, K, 4) a box for each class, or (N, R, 1, 4) for all.
        scores: (N, R, K).
        score_threshold, overlap, limit, for_onnx: see `suppressed`.

    Returns:
        (D,) images, (D,) regions and (D,) classes.
    """
    n, regions, num_classes = scores.shape
    if not for_onnx:
        classes = torch.arange(num_classes, device=scores.device).expand(n, regions, num_classes)
        every = boxes.expand(n, regions, num_classes, 4)
        flat = (every.reshape(n, -1, 4), scores.reshape(n, -1), classes.reshape(n, -1))
        images, candidates = _in_torchscript(*flat, score_threshold, overlap, limit)
        region = torch.div(candidates, num_classes, rounding_mode="floor")
        return images, region, candidates - region * num_classes
    by_class = scores.transpose(1, 2)
    if boxes.shape[2] == 1:
        chosen = _NonMaxSuppression.apply(boxes[:, :, 0], by_class, limit, overlap, score_threshold)
        images, classes, region = chosen.unbind(1)
    else:  # the operator has the boxes of a class for an image
        flat_boxes = boxes.transpose(1, 2).reshape(-1, boxes.shape[1], 4)
        flat_scores = by_class.reshape(-1, 1, boxes.shape[1])
        chosen = _NonMaxSuppression.apply(flat_boxes, flat_scores, limit, overlap, score_threshold)
        images = torch.div(chosen[:, 0], num_classes, rounding_mode="floor")
        classes, region = chosen[:, 0] - images * num_classes, chosen[:, 2]
    order = best_of_images(images, scores[images, region, classes], n, limit)
    return images[order], region[order], classes[order]


def best_of_images(images: Tensor, scores: Tensor, number: int, limit: int) -> Tensor:
    """Returns which of some candidates are the best `limit` of their image: by image, in each by decreasing score.

    Args:
        images: (D,) of each candidate.
        scores: (D,).
        number: of images.
        limit: of candidates.
    """
    order = scores.sort(descending=True)[1]
    images = images[order]
    rank = rank_in_image(images, number)
    kept = (rank < limit).nonzero()[:, 0]
    images, rank = images[kept], rank[kept]
    return order[kept][(images * (limit + 1) + rank).sort()[1]]  # no two are equal


def rank_in_image(images: Tensor, number: int) -> Tensor:
    """Returns how many entries before each one are of its image, (D,), for the images (D,) of some entries."""
    of_image = (images[:, None] == torch.arange(number, device=images.device)[None]).to(torch.int64)
    return (of_image.cumsum(0) * of_image).sum(1) - 1


@torch.jit.script
def _in_torchscript(
    boxes: Tensor, scores: Tensor, groups: Tensor, score_threshold: float, overlap: float, limit: int
) -> tuple[Tensor, Tensor]:
    images: list[Tensor] = []
    candidates: list[Tensor] = []
    for i in range(boxes.shape[0]):
        valid = (scores[i] > score_threshold).nonzero()[:, 0]
        kept = batched_nms(boxes[i][valid], scores[i][valid], groups[i][valid], overlap)[:limit]
        images.append(torch.full_like(kept, i))
        candidates.append(valid[kept])
    return torch.cat(images), torch.cat(candidates)


class _NonMaxSuppression(torch.autograd.Function):
    """ONNX's operator: (N, C, 4) boxes and (N, K, C) scores to (D, 3) image, class and box."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, limit: int, overlap: float, threshold: float) -> Tensor:
        chosen = []
        for i, of_image in enumerate(scores):
            for k, s in enumerate(of_image):
                valid = (s > threshold).nonzero()[:, 0]
                kept = valid[batched_nms(boxes[i][valid], s[valid], torch.zeros_like(valid), overlap)[:limit]]
                chosen.append(torch.stack([torch.full_like(kept, i), torch.full_like(kept, k), kept], dim=1))
        return torch.cat(chosen)

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, limit: int, overlap: float, threshold: float) -> Any:
        numbers = (torch.tensor([limit]), torch.tensor([overlap]), torch.tensor([threshold]))
        constants = [g.op("Constant", value_t=number) for number in numbers]
        found = g.op("NonMaxSuppression", boxes, scores, *constants)
        found.setType(found.type().with_sizes([None, 3]))
        return found
