"""FCOS, a one-stage detector without anchors (arXiv 1904.01355, improved in arXiv 2006.09214)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from d2lite.layers import ShapeSpec
from d2lite.modeling.anchor_generator import DefaultAnchorGenerator
from d2lite.modeling.backbone import Backbone
from d2lite.modeling.box_regression import Box2BoxTransformLinear, _dense_box_regression_loss
from d2lite.modeling.meta_arch.dense_detector import DenseDetector
from d2lite.modeling.meta_arch.focal_loss import dense_focal_loss
from d2lite.modeling.meta_arch.retinanet_head import RetinaNetHead
from d2lite.structures import Boxes, ImageList, Instances
from d2lite.structures.boxes import pairwise_point_box_distance
from d2lite.utils.events import get_event_storage

__all__ = ["FCOS", "FCOSHead"]


class FCOS(DenseDetector):
    """Every cell of a feature pyramid predicts classes, the distances from its center to the sides of a box, and
    how central it is in that box. A cell is represented by a box of the size of the stride around its center.
    """

    num_classes_key = "the num_classes of FCOS"

    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: list[str] | None = None,
        box2box_transform: Box2BoxTransformLinear | None = None,
        num_classes: int,
        center_sampling_radius: float = 1.5,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        test_score_thresh: float = 0.2,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.6,
        max_detections_per_image: int = 100,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        """
        Args:
            backbone, head_in_features, pixel_mean, pixel_std: see `DenseDetector`.
            head: maps a list of features to per-level logits (N, K, Hi, Wi), deltas (N, 4, Hi, Wi) and
                centerness (N, 1, Hi, Wi).
            box2box_transform: how the deltas encode boxes; by default distances in units of the stride.
            num_classes: K, the classes without background.
            center_sampling_radius: only cells within this distance of the center of an object, in strides, are
                positive; 0 admits all cells inside its box.
            focal_loss_alpha, focal_loss_gamma: parameters of the focal loss.
            test_score_thresh, test_topk_candidates, test_nms_thresh, max_detections_per_image: see
                `DenseDetector`.
        """
        super().__init__(backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.num_classes = num_classes
        shapes = backbone.output_shape()
        strides = [shapes[name].stride for name in self.head_in_features]
        self.anchor_generator = DefaultAnchorGenerator(
            sizes=[[stride] for stride in strides], aspect_ratios=[1.0], strides=strides
        )
        self.box2box_transform = box2box_transform or Box2BoxTransformLinear(normalize_by_size=True)
        self.center_sampling_radius = float(center_sampling_radius)
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image

    def forward_training(
        self,
        images: ImageList,
        features: list[torch.Tensor],
        predictions: Sequence[list[torch.Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, torch.Tensor]:
        """The losses "loss_fcos_cls", "loss_fcos_loc" and "loss_fcos_ctr" of a batch."""
        logits, deltas, centerness = self._transpose_dense_predictions(predictions, [self.num_classes, 4, 1])
        anchors = self.anchor_generator(features)
        gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(anchors, logits, gt_labels, deltas, gt_boxes, centerness)

    @torch.no_grad()
    def label_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Assigns the cells of all levels, R in total, to the ground truth of each image.

        Returns:
            gt_labels: for each image (R,) int64: a class in [0, K), or K for background.
            matched_gt_boxes: for each image (R, 4), the box that a cell belongs to; meaningful for
                foreground.
        """
        gt_labels, matched_gt_boxes = [], []
        for instances in gt_instances:
            if len(instances) > 0:
                matches = self._match_anchors(instances.gt_boxes, anchors)
                index = matches.clamp(min=0)
                labels = instances.gt_classes[index].masked_fill_(matches < 0, self.num_classes)
                boxes = instances.gt_boxes.tensor[index]
            else:
                boxes = torch.zeros_like(Boxes.cat(anchors).tensor)
                labels = torch.full_like(boxes[:, 0], self.num_classes, dtype=torch.int64)
            gt_labels.append(labels)
            matched_gt_boxes.append(boxes)
        return gt_labels, matched_gt_boxes

    def _match_anchors(self, gt_boxes: Boxes, anchors: list[Boxes]) -> torch.Tensor:
        """The ground truth (M boxes) of each of R cells, or -1: (R,) int64.

        A cell belongs to a box if its center is inside it and near its center, and if the box is of the scale
        of the level: its farthest side is 4 to 8 strides away, where the first level also takes smaller and
        the last level larger boxes. Among several, the smallest box wins.
        """
        cells = Boxes.cat(anchors)
        centers, strides = cells.get_centers(), cells.tensor[:, 2] - cells.tensor[:, 0]
        distances = pairwise_point_box_distance(centers, gt_boxes)  # (R, M, 4)
        farthest = distances.amax(dim=2)
        at_least, at_most = 4 * strides, 8 * strides
        at_least[: len(anchors[0])] = 0
        at_most[len(cells) - len(anchors[-1]) :] = math.inf
        match = (distances.amin(dim=2) > 0) & (farthest > at_least[:, None]) & (farthest < at_most[:, None])
        if self.center_sampling_radius > 0:
            offsets = (centers[:, None] - gt_boxes.get_centers()).abs().amax(dim=2)
            match &= offsets < self.center_sampling_radius * strides[:, None]
        area, matches = torch.where(match, gt_boxes.area(), math.inf).min(dim=1)
        return matches.masked_fill_(area.isinf(), -1)

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[torch.Tensor],
        gt_labels: list[torch.Tensor],
        pred_anchor_deltas: list[torch.Tensor],
        gt_boxes: list[torch.Tensor],
        pred_centerness: list[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            anchors: R_i boxes on each level, R in total.
            pred_logits, pred_anchor_deltas, pred_centerness: (N, R_i, K), (N, R_i, 4) and (N, R_i, 1) on each
                level.
            gt_labels, gt_boxes: for each of N images, as returned by `label_anchors`.

        Returns:
            "loss_fcos_cls" (focal), "loss_fcos_loc" (GIoU) and "loss_fcos_ctr" (binary cross-entropy): sums
            over the batch, divided by the running average of its foreground cells.
        """
        labels = torch.stack(gt_labels)
        foreground = (labels >= 0) & (labels != self.num_classes)
        image, index = foreground.nonzero(as_tuple=True)
        get_event_storage().put_scalar("num_pos_anchors", len(image) / len(labels))
        normalizer = self._ema_update("loss_normalizer", max(len(image), 1), 300)

        loss_cls = dense_focal_loss(pred_logits, labels, self.num_classes, self.focal_loss_alpha, self.focal_loss_gamma)
        loss_loc = _dense_box_regression_loss(
            anchors,
            self.box2box_transform,
            pred_anchor_deltas,
            gt_boxes,
            foreground,
            box_reg_loss_type="giou",
        )
        centerness = torch.cat(pred_centerness, dim=1).squeeze(2)[image, index]
        targets = self._centerness(Boxes.cat(anchors).tensor[index], torch.stack(gt_boxes)[image, index])
        loss_ctr = F.binary_cross_entropy_with_logits(centerness.float(), targets, reduction="sum")
        return {
            "loss_fcos_cls": loss_cls / normalizer,
            "loss_fcos_loc": loss_loc / normalizer,
            "loss_fcos_ctr": loss_ctr / normalizer,
        }

    def _centerness(self, cells: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Centerness of each cell (P, 4) in its box (P, 4), in (0, 1] (arXiv 1904.01355, equation 3)."""
        left, top, right, bottom = self.box2box_transform.get_deltas(cells, boxes).unbind(dim=1)
        horizontal = torch.minimum(left, right) / torch.maximum(left, right)
        vertical = torch.minimum(top, bottom) / torch.maximum(top, bottom)
        return (horizontal * vertical).sqrt()

    def forward_inference(
        self, images: ImageList, features: list[torch.Tensor], predictions: Sequence[list[torch.Tensor]]
    ) -> list[Instances]:
        """The detections of each image, at the network's resolution; scores are sqrt(class * centerness)."""
        logits, deltas, centerness = self._transpose_dense_predictions(predictions, [self.num_classes, 4, 1])
        anchors = self.anchor_generator(features)
        results = []
        for i, image_size in enumerate(images.image_sizes):
            scores = [(x[i].sigmoid() * c[i].sigmoid()).sqrt() for x, c in zip(logits, centerness)]
            results.append(self.inference_single_image(anchors, scores, [x[i] for x in deltas], image_size))
        return results


class FCOSHead(RetinaNetHead):
    """The head of RetinaNet with one prediction per cell, and a centerness branch on the box subnet."""

    def __init__(self, *, input_shape: list[ShapeSpec], conv_dims: list[int], **kwargs: Any) -> None:
        """
        Args:
            input_shape, conv_dims: as in `RetinaNetHead`.
            kwargs: `num_classes`, `norm` and `prior_prob` of `RetinaNetHead`.
        """
        super().__init__(input_shape=input_shape, conv_dims=conv_dims, num_anchors=1, **kwargs)
        self.ctrness = nn.Conv2d(conv_dims[-1], 1, 3, padding=1)
        nn.init.normal_(self.ctrness.weight, std=0.01)
        nn.init.zeros_(self.ctrness.bias)

    def forward(
        self, features: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """
        Args:
            features: (N, C, Hi, Wi) of each level.

        Returns:
            Logits (N, K, Hi, Wi), bbox_reg (N, 4, Hi, Wi) and ctrness (N, 1, Hi, Wi) of each level.
        """
        self._check_features(features)
        logits = [self.cls_score(self.cls_subnet(x)) for x in features]
        box_features = [self.bbox_subnet(x) for x in features]
        return logits, [self.bbox_pred(x) for x in box_features], [self.ctrness(x) for x in box_features]
