"""RetinaNet, the one-stage detector trained with the focal loss (arXiv 1708.02002)."""

from collections.abc import Sequence

import torch
from torch import nn

from d2lite.config import CfgNode, configurable
from d2lite.modeling.anchor_generator import build_anchor_generator
from d2lite.modeling.backbone import Backbone, build_backbone
from d2lite.modeling.box_regression import Box2BoxTransform, _dense_box_regression_loss
from d2lite.modeling.matcher import Matcher
from d2lite.modeling.meta_arch.build import META_ARCH_REGISTRY
from d2lite.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from d2lite.modeling.meta_arch.focal_loss import dense_focal_loss
from d2lite.modeling.meta_arch.retinanet_head import RetinaNetHead
from d2lite.structures import Boxes, ImageList, Instances, pairwise_iou
from d2lite.utils.events import get_event_storage

__all__ = ["RetinaNet", "RetinaNetHead", "permute_to_N_HWA_K"]


@META_ARCH_REGISTRY.register()
class RetinaNet(DenseDetector):
    """Anchors at every cell of a feature pyramid, classified and refined by two convolutional subnets."""

    num_classes_key = "MODEL.RETINANET.NUM_CLASSES"

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: list[str],
        anchor_generator: nn.Module,
        box2box_transform: Box2BoxTransform,
        anchor_matcher: Matcher,
        num_classes: int,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        smooth_l1_beta: float = 0.0,
        box_reg_loss_type: str = "smooth_l1",
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.5,
        max_detections_per_image: int = 100,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        vis_period: int = 0,
        input_format: str = "BGR",
    ) -> None:
        """
        Args:
            backbone, head_in_features, pixel_mean, pixel_std: see `DenseDetector`.
            head: maps a list of features to per-level logits (N, A * K, Hi, Wi) and deltas (N, A * 4, Hi,
                Wi).
            anchor_generator: makes the anchors of these features.
            box2box_transform: how the deltas encode boxes relative to anchors.
            anchor_matcher: labels anchors by their overlap with the ground truth.
            num_classes: K, the classes without background.
            focal_loss_alpha, focal_loss_gamma: parameters of the focal loss.
            smooth_l1_beta: where smooth L1 turns from quadratic to linear.
            box_reg_loss_type: "smooth_l1", "giou", "diou" or "ciou".
            test_score_thresh, test_topk_candidates, test_nms_thresh, max_detections_per_image: see
                `DenseDetector`.
            vis_period: iterations between two visualizations of training detections; 0 for none.
            input_format: channel order of the input image, for these visualizations.
        """
        super().__init__(backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.num_classes = num_classes
        self.anchor_generator = anchor_generator
        self.box2box_transform = box2box_transform
        self.anchor_matcher = anchor_matcher
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.smooth_l1_beta = smooth_l1_beta
        self.box_reg_loss_type = box_reg_loss_type
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image
        self.vis_period = vis_period
        self.input_format = input_format

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Constructor arguments from MODEL.RETINANET, with the parts of the model built."""
        net, node = build_backbone(cfg), cfg.MODEL.RETINANET
        shapes = net.output_shape()
        feature_shapes = [shapes[name] for name in node.IN_FEATURES]
        return {
            "backbone": net,
            "head": RetinaNetHead(cfg, feature_shapes),
            "head_in_features": node.IN_FEATURES,
            "anchor_generator": build_anchor_generator(cfg, feature_shapes),
            "box2box_transform": Box2BoxTransform(node.BBOX_REG_WEIGHTS),
            "anchor_matcher": Matcher(node.IOU_THRESHOLDS, node.IOU_LABELS, allow_low_quality_matches=True),
            "num_classes": node.NUM_CLASSES,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
            "smooth_l1_beta": node.SMOOTH_L1_LOSS_BETA,
            "box_reg_loss_type": node.BBOX_REG_LOSS_TYPE,
            "test_score_thresh": node.SCORE_THRESH_TEST,
            "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": node.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "vis_period": cfg.VIS_PERIOD,
            "input_format": cfg.INPUT.FORMAT,
        }

    def forward_training(
        self,
        images: ImageList,
        features: list[torch.Tensor],
        predictions: Sequence[list[torch.Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, torch.Tensor]:
        """The losses "loss_cls" and "loss_box_reg" of a batch."""
        logits, deltas = self._transpose_dense_predictions(predictions, [self.num_classes, 4])
        boxes = self.anchor_generator(features)
        labels, matched = self.label_anchors(boxes, gt_instances)
        return self.losses(boxes, logits, labels, deltas, matched)

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[torch.Tensor],
        gt_labels: list[torch.Tensor],
        pred_anchor_deltas: list[torch.Tensor],
        gt_boxes: list[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            anchors: R_i boxes on each level, R in total.
            pred_logits, pred_anchor_deltas: (N, R_i, K) and (N, R_i, 4) on each level.
            gt_labels, gt_boxes: for each of N images, as returned by `label_anchors`.

        Returns:
            "loss_cls" and "loss_box_reg": sums over the batch, divided by the running average of its
            foreground anchors.
        """
        labels = torch.stack(gt_labels)
        foreground = (labels >= 0) & (labels != self.num_classes)
        num_foreground = int(foreground.sum())
        get_event_storage().put_scalar("num_pos_anchors", num_foreground / len(labels))
        normalizer = self._ema_update("loss_normalizer", max(num_foreground, 1), 100)

        loss_cls = dense_focal_loss(pred_logits, labels, self.num_classes, self.focal_loss_alpha, self.focal_loss_gamma)
        measure = (self.box_reg_loss_type, self.smooth_l1_beta)
        loss_box = _dense_box_regression_loss(
            anchors, self.box2box_transform, pred_anchor_deltas, gt_boxes, foreground, *measure
        )
        return {"loss_cls": loss_cls / normalizer, "loss_box_reg": loss_box / normalizer}

    @torch.no_grad()
    def label_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Matches the anchors of all levels, R in total, to the ground truth of each image.

        Returns:
            gt_labels: for each image (R,) int64: a class in [0, K), K for background, or -1 for ignored.
            matched_gt_boxes: for each image (R, 4), the box matched to each anchor; meaningful for
                foreground.
        """
        all_anchors = Boxes.cat(anchors)
        labels, boxes = zip(*(self._label(all_anchors, instances) for instances in gt_instances))
        return list(labels), list(boxes)

    def _label(self, anchors: Boxes, truth: Instances) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels and matched boxes for one image."""
        matches, match_labels = self.anchor_matcher(pairwise_iou(truth.gt_boxes, anchors))
        if len(truth) == 0:
            return torch.full_like(matches, self.num_classes), torch.zeros_like(anchors.tensor)
        labels = truth.gt_classes[matches]
        labels.masked_fill_(match_labels == 0, self.num_classes)
        labels.masked_fill_(match_labels == -1, -1)
        return labels, truth.gt_boxes.tensor[matches]

    def forward_inference(
        self, images: ImageList, features: list[torch.Tensor], predictions: Sequence[list[torch.Tensor]]
    ) -> list[Instances]:
        """The detections of each image, at the network's resolution."""
        logits, deltas = self._transpose_dense_predictions(predictions, [self.num_classes, 4])
        boxes = self.anchor_generator(features)
        return [
            self.inference_single_image(boxes, [x[i].sigmoid() for x in logits], [x[i] for x in deltas], image_size)
            for i, image_size in enumerate(images.image_sizes)
        ]
