"""Non-maximum suppression of a batch as a graph: torchvision's in TorchScript, the operator of that name in ONNX."""

from typing import Any

import torch
from torch import Tensor
from torchvision.ops import batched_nms


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
        scores: (N, C).
        groups: (N, C) classes; only boxes of one class suppress each other.
        num_groups: classes.
        score_threshold: only candidates above it count.
        overlap: intersection over union above which the weaker of two boxes is suppressed.
        limit: detections of an image.
        for_onnx: see above.

    Returns:
        (D,) images, and (D,) candidates: by image, in each by decreasing score.
    """
    if for_onnx:
        return _in_onnx(boxes, scores, groups, num_groups, score_threshold, overlap, limit)
    found: tuple[Tensor, Tensor] = _in_torchscript(boxes, scores, groups, score_threshold, overlap, limit)
    return found


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


def _in_onnx(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    num_groups: int,
    score_threshold: float,
    overlap: float,
    limit: int,
) -> tuple[Tensor, Tensor]:
    of_class = groups[:, None] == torch.arange(num_groups, device=groups.device)[None, :, None]
    # the operator takes a score of every box for every class: each candidate is of one
    by_class = torch.where(of_class, scores[:, None], scores.new_full((), -2.0))
    chosen = _NonMaxSuppression.apply(boxes, by_class, limit, overlap, score_threshold)
    images, candidates = chosen[:, 0], chosen[:, 2]
    order = scores[images, candidates].sort(descending=True)[1]
    images, candidates = images[order], candidates[order]
    # the best of each image, although the others of the batch stand between them
    of_image = (images[:, None] == torch.arange(boxes.shape[0], device=images.device)[None]).to(torch.int64)
    rank = (of_image.cumsum(0) * of_image).sum(1)
    kept = (rank <= limit).nonzero()[:, 0]
    images, candidates, rank = images[kept], candidates[kept], rank[kept]
    order = (images * (limit + 1) + rank).sort()[1]  # no two are equal
    return images[order], candidates[order]


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
