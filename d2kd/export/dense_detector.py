"""RetinaNet and FCOS as a graph: anchors from the shapes of features, candidates of fixed number, suppression."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .base import Exported, image_index, register_export, stacked_inputs
from .suppression import suppressed


class DetectionExport(Exported):
    """Base of what gives boxes: in pixels of the image that it was given, clipped to it."""

    TASK = "detection"
    OUTPUTS = ("boxes", "scores", "classes", "image")
    #: Detections on the images of a verification below which it would show little.
    ENOUGH: ClassVar[int] = 10

    def lower_threshold(self, images: Sequence[Tensor]) -> float | None:
        """See the base class; three times `ENOUGH` scores are above the new threshold before suppression."""
        before = float(self.model.test_score_thresh)
        if sum(len(self.eager(x)[1]) for x in images) >= self.ENOUGH:
            return None
        self.restore_threshold(-1.0)
        scores = torch.cat([self.eager(x)[1] for x in images]).sort(descending=True)[0].tolist()
        number = min(3 * self.ENOUGH, len(scores) - 1)
        # between two scores, so that rounding does not decide
        threshold = (scores[number - 1] + scores[number]) / 2 if number > 0 else -1.0
        self.restore_threshold(min(threshold, before))
        return before

    def restore_threshold(self, threshold: float) -> None:
        """See the base class."""
        self.model.test_score_thresh = threshold

    def eager(self, images: Tensor) -> tuple[Tensor, ...]:
        """Returns (D, 4) boxes, (D,) scores, classes and numbers of the image, of Detectron2's own inference."""
        found = [x["instances"] for x in self.model(stacked_inputs(images))]
        return (
            torch.cat([x.pred_boxes.tensor for x in found]),
            torch.cat([x.scores for x in found]),
            torch.cat([x.pred_classes for x in found]),
            image_index([len(x) for x in found]),
        )


class DenseDetectorExport(DetectionExport):
    """Base of RetinaNet and FCOS: a head on levels, whose predictions are decoded from anchors."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        Args:
            images: (N, 3, H, W), see `Exported`.

        Returns:
            boxes (D, 4) in XYXY pixels, scores (D,) by decreasing score within each image, classes (D,) and number of
            the image (D,), int64.
        """
        model = self.model
        features = model.backbone(self.normalized(images))
        levels = self.levels([features[name] for name in model.head_in_features])
        boxes, scores, classes = (torch.cat(parts, dim=1) for parts in zip(*levels))
        return detections(
            images,
            boxes,
            scores,
            classes,
            suppressed(
                boxes,
                scores,
                classes,
                self.num_classes,
                float(model.test_score_thresh),
                float(model.test_nms_thresh),
                int(model.max_detections_per_image),
                self.for_onnx,
            ),
        )

    def levels(self, features: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Returns the best candidates of each level: boxes (N, C, 4), scores (N, C) and classes (N, C)."""
        generator = self.model.anchor_generator
        anchors = [
            grid_anchors(feature, cell, stride, generator.offset)
            for feature, cell, stride in zip(features, generator.cell_anchors, generator.strides)
        ]
        return [
            self._candidates(boxes, scores, deltas)
            for boxes, (scores, deltas) in zip(anchors, self.scores_and_deltas(features))
        ]

    def scores_and_deltas(self, features: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Returns of each level (N, R, K) scores and (N, R, 4) deltas of its R anchors, in float32."""
        raise NotImplementedError

    def _candidates(self, anchors: Tensor, scores: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        best, index = top_candidates(scores.flatten(1), int(self.model.test_topk_candidates))
        place = torch.div(index, self.num_classes, rounding_mode="floor")
        chosen = deltas.gather(1, place[..., None].expand(-1, -1, 4))
        boxes = self.model.box2box_transform.apply_deltas(chosen.reshape(-1, 4), anchors[place].reshape(-1, 4))
        return boxes.reshape(chosen.shape), best, index - place * self.num_classes


@register_export("RetinaNet")
class RetinaNetExport(DenseDetectorExport):
    """Detectron2's RetinaNet."""

    def scores_and_deltas(self, features: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """See the base class."""
        logits, deltas = self.model.head(features)
        return [
            (by_anchor(x, self.num_classes).float().sigmoid(), by_anchor(d, 4).float()) for x, d in zip(logits, deltas)
        ]


@register_export("FCOS")
class FCOSExport(DenseDetectorExport):
    """Detectron2's FCOS, whose scores are the root of class score times centerness."""

    def scores_and_deltas(self, features: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """See the base class."""
        found = []
        for logits, deltas, centerness in zip(*self.model.head(features)):
            scores = by_anchor(logits, self.num_classes).float().sigmoid() * by_anchor(centerness, 1).float().sigmoid()
            found.append((scores.sqrt(), by_anchor(deltas, 4).float()))
        return found


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

    A row with fewer is filled up with scores of -2, at place 0: a graph cannot ask for as many as there are.
    """
    filling = scores.new_full((1, number), -2.0).expand(scores.shape[0], -1)
    best, index = torch.cat([scores, filling], dim=1).topk(number, dim=1)
    return best, torch.where(best > -2.0, index, torch.zeros_like(index))


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
    inside = ((found[:, 2:] - found[:, :2]) > 0).all(dim=1).nonzero()[:, 0]
    image, candidate = image[inside], candidate[inside]
    return found[inside], scores[image, candidate], classes[image, candidate], image


def clipped(boxes: Tensor, images: Tensor) -> Tensor:
    """Returns boxes (D, 4) clipped to images (N, 3, H, W)."""
    height, width = (shape_number(images, side) for side in (2, 3))
    limits = torch.stack([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limits)


def shape_number(tensor: Tensor, side: int) -> Tensor:
    """Returns a side of a tensor as a number in float32, which a trace keeps as a computation."""
    return torch._shape_as_tensor(tensor)[side].to(device=tensor.device, dtype=torch.float32)
