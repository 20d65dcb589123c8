"""RetinaNet, FCOS, GFL and RepPoints as a graph: predictions on levels, decoded from anchors, cells or points."""

import torch
from torch import Tensor

from d2kd.modeling.meta_arch.gfl import SIDES, box_distances
from d2kd.modeling.meta_arch.reppoints.points import as_points, flatten_levels
from d2kd.modeling.meta_arch.reppoints.points import place as place_boxes

from .base import register_export
from .detection import DetectionExport, by_anchor, clipped, detections, grid_anchors, has_area, top_candidates
from .suppression import NOTHING, suppressed


class DenseDetectorExport(DetectionExport):
    """Base of RetinaNet, FCOS and GFL: a head on levels, whose predictions are decoded from anchors."""

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
        boxes, scores = self.admitted(boxes, scores, images)
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
        generator, found = self.model.anchor_generator, []
        of_level = zip(features, self.scores_and_deltas(features), generator.cell_anchors, generator.strides)
        for feature, (scores, deltas), cell, stride in of_level:
            anchors = grid_anchors(feature, cell, stride, generator.offset)
            best, place, classes = self.candidates(scores)
            chosen = deltas.gather(1, place[..., None].expand(-1, -1, 4))
            boxes = self.model.box2box_transform.apply_deltas(chosen.reshape(-1, 4), anchors[place].reshape(-1, 4))
            found.append((boxes.reshape(chosen.shape), best, classes))
        return found

    def scores_and_deltas(self, features: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Returns of each level (N, R, K) scores and (N, R, 4) deltas of its R anchors, in float32."""
        raise NotImplementedError

    def admitted(self, boxes: Tensor, scores: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns boxes (N, C, 4) and scores (N, C) as they enter suppression: Detectron2 clips boxes after it."""
        return boxes, scores

    def candidates(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the best of scores (N, R, K), their places in R and their classes, (N, C) each."""
        best, index = top_candidates(scores.flatten(1), int(self.model.test_topk_candidates))
        place = torch.div(index, self.num_classes, rounding_mode="floor")
        return best, place, index - place * self.num_classes


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


@register_export("GFL")
class GFLExport(DenseDetectorExport):
    """d2kd's GFL; boxes only, without the distributions of their sides."""

    def scores_and_deltas(self, features: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """See the base class."""
        found = []
        for logits, bins in zip(*self.model.head(features)):
            distances = box_distances(by_anchor(bins, SIDES * self.model.num_bins))
            found.append((by_anchor(logits, self.num_classes).float().sigmoid(), distances))
        return found


@register_export("RepPoints")
class RepPointsExport(DenseDetectorExport):
    """d2kd's RepPoints; boxes only, without the points that they are made of."""

    def levels(self, features: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """See the base class."""
        maps, found = self.model.head(features), []
        for feature, logits, points, stride in zip(features, maps.logits, maps.refined, self.model.strides):
            best, place, classes = self.candidates(by_anchor(logits, self.num_classes).float().sigmoid())
            xy = grid_anchors(feature, feature.new_zeros(1, 4), stride, 0.0)[:, :2]
            boxes = self.model.point_transform(as_points(flatten_levels([points])))
            boxes = place_boxes(boxes, xy, xy.new_full((1,), float(stride)))
            found.append((boxes.gather(1, place[..., None].expand(-1, -1, 4)), best, classes))
        return found

    def admitted(self, boxes: Tensor, scores: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class; these are clipped before it, and left out where nothing is left of them."""
        boxes = clipped(boxes, images)
        return boxes, torch.where(has_area(boxes), scores, torch.full_like(scores, NOTHING))
