"""Region proposal network (Faster R-CNN, arXiv 1506.01497)."""

import torch
import torch.nn.functional as F
from torch import nn

from d2lite.config import CfgNode, configurable
from d2lite.layers import ShapeSpec
from d2lite.modeling.anchor_generator import build_anchor_generator
from d2lite.modeling.box_regression import Box2BoxTransform, _dense_box_regression_loss
from d2lite.modeling.matcher import Matcher
from d2lite.modeling.proposal_generator.build import PROPOSAL_GENERATOR_REGISTRY
from d2lite.modeling.proposal_generator.proposal_utils import (
    select_top_anchors,
    suppress_proposals,
    take_rows,
)
from d2lite.modeling.proposal_generator.rpn_head import RPN_HEAD_REGISTRY, StandardRPNHead, build_rpn_head
from d2lite.modeling.sampling import subsample_labels
from d2lite.structures import Boxes, ImageList, Instances, pairwise_iou
from d2lite.utils.events import get_event_storage
from d2lite.utils.memory import retry_if_cuda_oom

__all__ = ["RPN", "RPN_HEAD_REGISTRY", "StandardRPNHead", "build_rpn_head"]


@PROPOSAL_GENERATOR_REGISTRY.register()
class RPN(nn.Module):
    """Classifies every anchor as object or background, refines it, and proposes the best ones."""

    @configurable
    def __init__(
        self,
        *,
        in_features: list[str],
        head: nn.Module,
        anchor_generator: nn.Module,
        anchor_matcher: Matcher,
        box2box_transform: Box2BoxTransform,
        batch_size_per_image: int,
        positive_fraction: float,
        pre_nms_topk: tuple[int, int],
        post_nms_topk: tuple[int, int],
        nms_thresh: float = 0.7,
        min_box_size: float = 0.0,
        anchor_boundary_thresh: float = -1.0,
        loss_weight: float | dict[str, float] = 1.0,
        box_reg_loss_type: str = "smooth_l1",
        smooth_l1_beta: float = 0.0,
    ) -> None:
        """
        Args:
            in_features: names of the feature maps to use.
            head: from feature maps to logits and deltas, see `StandardRPNHead`.
            anchor_generator: from feature maps to anchors.
            anchor_matcher: labels anchors as 1 (object), 0 (background) or -1 (ignored) by their IoU.
            box2box_transform: how deltas encode boxes relative to anchors.
            batch_size_per_image: anchors per image that enter the loss.
            positive_fraction: maximum fraction of them that may be positive.
            pre_nms_topk: anchors per level before suppression, in (training, testing).
            post_nms_topk: proposals per image, in (training, testing).
            nms_thresh: IoU above which the lower score is suppressed.
            min_box_size: proposals survive if both sides are longer than this, in pixels.
            anchor_boundary_thresh: ignore anchors that reach further than this out of the image, in pixels;
                negative: none.
            loss_weight: one factor for both losses, or one per name ("loss_rpn_cls", "loss_rpn_loc").
            box_reg_loss_type: "smooth_l1", "giou", "diou" or "ciou".
            smooth_l1_beta: where smooth L1 turns from quadratic to linear; 0 is plain L1.
        """
        super().__init__()
        self.in_features = in_features
        self.rpn_head = head
        self.anchor_generator = anchor_generator
        self.anchor_matcher = anchor_matcher
        self.box2box_transform = box2box_transform
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.pre_nms_topk = {True: pre_nms_topk[0], False: pre_nms_topk[1]}
        self.post_nms_topk = {True: post_nms_topk[0], False: post_nms_topk[1]}
        self.nms_thresh = nms_thresh
        self.min_box_size = float(min_box_size)
        self.anchor_boundary_thresh = anchor_boundary_thresh
        if not isinstance(loss_weight, dict):
            loss_weight = {"loss_rpn_cls": loss_weight, "loss_rpn_loc": loss_weight}
        self.loss_weight = loss_weight
        self.box_reg_loss_type = box_reg_loss_type
        self.smooth_l1_beta = smooth_l1_beta

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Constructor arguments from MODEL.RPN, with the head and the anchor generator built."""
        rpn = cfg.MODEL.RPN
        shapes = [input_shape[name] for name in rpn.IN_FEATURES]
        return {
            "in_features": rpn.IN_FEATURES,
            "anchor_generator": build_anchor_generator(cfg, shapes),
            "anchor_matcher": Matcher(rpn.IOU_THRESHOLDS, rpn.IOU_LABELS, allow_low_quality_matches=True),
            "box2box_transform": Box2BoxTransform(weights=rpn.BBOX_REG_WEIGHTS),
            "batch_size_per_image": rpn.BATCH_SIZE_PER_IMAGE,
            "positive_fraction": rpn.POSITIVE_FRACTION,
            "pre_nms_topk": (rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST),
            "post_nms_topk": (rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST),
            "nms_thresh": rpn.NMS_THRESH,
            "min_box_size": cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE,
            "anchor_boundary_thresh": rpn.BOUNDARY_THRESH,
            "loss_weight": {
                "loss_rpn_cls": rpn.LOSS_WEIGHT,
                "loss_rpn_loc": rpn.BBOX_REG_LOSS_WEIGHT * rpn.LOSS_WEIGHT,
            },
            "box_reg_loss_type": rpn.BBOX_REG_LOSS_TYPE,
            "smooth_l1_beta": rpn.SMOOTH_L1_BETA,
            "head": build_rpn_head(cfg, shapes),
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """
        Args:
            images: the N input images, for their sizes.
            features: feature maps (N, C, H_i, W_i) by name.
            gt_instances: N ground truths with `gt_boxes`; needed in training.

        Returns:
            N `Instances` with `proposal_boxes` and `objectness_logits`, outside the autograd graph; and the
            losses, empty outside training.
        """
        maps = [features[name] for name in self.in_features]
        anchors = self.anchor_generator(maps)
        logits, deltas = self.rpn_head(maps)
        # (N, A, H, W) -> (N, H * W * A): the order of the anchors
        logits = [x.permute(0, 2, 3, 1).flatten(1) for x in logits]
        # (N, A * D, H, W) -> (N, H * W * A, D)
        box_dim = self.anchor_generator.box_dim
        deltas = [x.unflatten(1, (-1, box_dim)).permute(0, 3, 4, 1, 2).reshape(x.shape[0], -1, box_dim) for x in deltas]
        losses = {}
        if self.training:
            assert gt_instances is not None, "RPN needs `gt_instances` in training"
            together = [Boxes.cat(anchors)]
            gt_labels, gt_boxes = self.label_and_sample_anchors(together, gt_instances)
            losses = self.losses(together, logits, gt_labels, deltas, gt_boxes)
        return self.predict_proposals(anchors, logits, deltas, images.image_sizes), losses

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Matches anchors (R in all levels together) with ground truth, and samples those that enter the loss.

        Returns:
            Per image the labels (R,) int8: 1 object, 0 background, -1 not used; and the matched box (R, 4)
            of each anchor, which is defined only for label 1.
        """
        all_anchors = Boxes.cat(anchors)
        gt_labels, matched_boxes = [], []
        for gt in gt_instances:
            gt_boxes: Boxes = gt.gt_boxes
            quality = retry_if_cuda_oom(pairwise_iou)(gt_boxes, all_anchors)
            index, labels = retry_if_cuda_oom(self.anchor_matcher)(quality)
            del quality  # the largest tensor here; frees its memory for the next image
            labels = labels.to(all_anchors.device)
            if self.anchor_boundary_thresh >= 0:
                labels[~all_anchors.inside_box(gt.image_size, self.anchor_boundary_thresh)] = -1
            gt_labels.append(self._subsample_labels(labels))
            if len(gt_boxes) > 0:
                matched_boxes.append(gt_boxes.tensor[index.to(gt_boxes.device)])
            else:
                matched_boxes.append(torch.zeros_like(all_anchors.tensor))
        return gt_labels, matched_boxes

    def _subsample_labels(self, label: torch.Tensor) -> torch.Tensor:
        """Keeps the labels of a random sample, in place, and sets all others to -1."""
        positive, negative = subsample_labels(label, self.batch_size_per_image, self.positive_fraction, 0)
        return label.fill_(-1).index_fill_(0, positive, 1).index_fill_(0, negative, 0)

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[torch.Tensor],
        gt_labels: list[torch.Tensor],
        pred_anchor_deltas: list[torch.Tensor],
        gt_boxes: list[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Binary cross entropy of the objectness and regression loss of the positives, both divided by the
        number of anchors that the batch may use.

        Args:
            anchors: boxes (R_i, 4) of each level, or one element with all of them.
            pred_objectness_logits: (N, R_i) of each level.
            gt_labels: N tensors (R,), see `label_and_sample_anchors`.
            pred_anchor_deltas: (N, R_i, 4) of each level.
            gt_boxes: N tensors (R, 4).

        Returns:
            "loss_rpn_cls" and "loss_rpn_loc".
        """
        num_images = len(gt_labels)
        labels = torch.stack(gt_labels)
        positive = labels == 1
        self._log_counts(positive.sum(), (labels == 0).sum(), num_images)

        box_loss = _dense_box_regression_loss(
            anchors,
            self.box2box_transform,
            pred_anchor_deltas,
            gt_boxes,
            positive,
            box_reg_loss_type=self.box_reg_loss_type,
            smooth_l1_beta=self.smooth_l1_beta,
        )
        image, index = (labels >= 0).nonzero(as_tuple=True)
        logits = torch.cat(pred_objectness_logits, dim=1)[image, index]
        objectness_loss = F.binary_cross_entropy_with_logits(
            logits, labels[image, index].to(logits.dtype), reduction="sum"
        )
        normalizer = self.batch_size_per_image * num_images
        losses = {"loss_rpn_cls": objectness_loss / normalizer, "loss_rpn_loc": box_loss / normalizer}
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    @staticmethod
    def _log_counts(num_positive: torch.Tensor, num_negative: torch.Tensor, num_images: int) -> None:
        positive, negative = torch.stack([num_positive, num_negative]).tolist()
        storage = get_event_storage()
        storage.put_scalar("rpn/num_pos_anchors", positive / num_images)
        storage.put_scalar("rpn/num_neg_anchors", negative / num_images)

    @torch.no_grad()
    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[torch.Tensor],
        pred_anchor_deltas: list[torch.Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """Decodes and filters the predictions, see `find_top_rpn_proposals`. Only the best anchors of each level
        are decoded. The heads treat the proposals as constants: no gradient flows through their coordinates.

        Args:
            anchors: boxes (R_i, 4) of each level.
            pred_objectness_logits: (N, R_i) of each level.
            pred_anchor_deltas: (N, R_i, 4) of each level.
            image_sizes: (height, width) of the N images.
        """
        scores, indices = select_top_anchors(pred_objectness_logits, len(image_sizes), self.pre_nms_topk[self.training])
        boxes = [
            self.box2box_transform.apply_deltas(take_rows(d, i).flatten(0, 1), a.tensor[i.flatten()]).view(*i.shape, -1)
            for a, d, i in zip(anchors, pred_anchor_deltas, indices)
        ]
        return suppress_proposals(
            boxes,
            scores,
            image_sizes,
            self.nms_thresh,
            self.post_nms_topk[self.training],
            self.min_box_size,
            self.training,
        )
