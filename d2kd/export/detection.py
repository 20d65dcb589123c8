"""What exports of detectors share: anchors, candidates of fixed number, clipping, detections of a batch."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .base import Exported, image_index, stacked_inputs
from .suppression import NOTHING


class DetectionExport(Exported):
    """Base of what gives boxes: in pixels of the image that it was given, clipped to it."""

    TASK = "detection"
    OUTPUTS: tuple[str, ...] = ("boxes", "scores", "classes", "image")
    #: Detections on the images of a verification below which it would show little.
    ENOUGH: ClassVar[int] = 10

    def lower_threshold(self, images: Sequence[Tensor]) -> float | None:
        """See the base class; three times `ENOUGH` scores are above the new threshold before suppression."""
        before = self.threshold
        if sum(len(self.eager(x)[1]) for x in images) >= self.ENOUGH:
            return None
        self.restore_threshold(-1.0)
        scores = torch.cat([self.eager(x)[1] for x in images]).sort(descending=True)[0].tolist()
        number = min(3 * self.ENOUGH, len(scores) - 1)
        # between two scores, so that rounding does not decide
        threshold = (scores[number - 1] + scores[number]) / 2 if number > 0 else -1.0
        self.restore_threshold(min(threshold, before))
        return before

    @property
    def threshold(self) -> float:
        """Scores of detections are above it."""
        return float(self.model.test_score_thresh)

    def restore_threshold(self, threshold: float) -> None:
        """See the base class."""
        self.model.test_score_thresh = threshold

    def eager(self, images: Tensor) -> tuple[Tensor, ...]:
        """Returns (D, 4) boxes, (D,) scores, classes and numbers of the image, of Detectron2's own inference.

        Models with masks give them too, (D, H, W) bool.
        """
        found = [x["instances"] for x in self.model(stacked_inputs(images))]
        masks = (torch.cat([x.pred_masks.bool() for x in found]),) if "masks" in self.OUTPUTS else ()
        return (
            torch.cat([x.pred_boxes.tensor for x in found]),
            torch.cat([x.scores for x in found]),
            torch.cat([x.pred_classes for x in found]),
            image_index([len(x) for x in found]),
            *masks,
        )


def grid_anchors(feature: Tensor, cell: Tensor, stride: int, offset: float) -> Tensor:
    """Returns the anchors (H * W * A, 4) of a map (N, C, H, W), from the A anchors (A, 4) of a cell."""
    y, x = (
        (torch.arange(feature.shape[side], dtype=torch.float32, device=feature.device) + offset) * stride
        for side in (2, 3)
    )
    y, x = torch.meshgrid(y, x, indexing="ij")
    shift = torch.stack([x, y, x, y], dim=-1)
    return (shift[:, :, None] + cell.float()).reshape(-1, 4)


def by_anchor(predictions: Tensor, numbers: int) -> Tensor:
    """Returns predictions (N, A * numbers, H, W) as (N, H * W * A, numbers)."""
    n, _, height, width = predictions.shape
    return predictions.view(n, -1, numbers, height, width).permute(0, 3, 4, 1, 2).reshape(n, -1, numbers)


def top_candidates(scores: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Returns the best scores of each row and their places, both (N, number).

    A row with fewer is filled up with `NOTHING`, at place 0: a graph cannot ask for as many as there are.
    """
    filling = scores.new_full((1, number), NOTHING).expand(scores.shape[0], -1)
    best, index = torch.cat([scores, filling], dim=1).topk(number, dim=1)
    return best, torch.where(best > NOTHING, index, torch.zeros_like(index))


def detections(
    images: Tensor, boxes: Tensor, scores: Tensor, classes: Tensor, chosen: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the chosen candidates with their boxes clipped to the image; those that lie outside it are dropped.

    Args:
        images: (N, 3, H, W) without padding.
        boxes, scores, classes: (N, C, 4), (N, C) and (N, C).
        chosen: (D,) images and candidates.
    """
    image, candidate = chosen
    found = clipped(boxes[image, candidate], images)
    inside = has_area(found).nonzero()[:, 0]
    image, candidate = image[inside], candidate[inside]
    return found[inside], scores[image, candidate], classes[image, candidate], image


def has_area(boxes: Tensor, least: float = 0.0) -> Tensor:
    """Returns of which boxes (..., 4) both sides are longer than `least` pixels."""
    return ((boxes[..., 2:] - boxes[..., :2]) > least).all(dim=-1)


def clipped(boxes: Tensor, images: Tensor) -> Tensor:
    """Returns boxes (..., 4) clipped to images (N, 3, H, W)."""
    height, width = (shape_number(images, side) for side in (2, 3))
    limits = torch.stack([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limits)


def shape_number(tensor: Tensor, side: int) -> Tensor:
    """Returns a side of a tensor as a number in float32, which a trace keeps as a computation."""
    return torch._shape_as_tensor(tensor)[side].to(device=tensor.device, dtype=torch.float32)
