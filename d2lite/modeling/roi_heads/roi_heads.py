"""The heads of FPN models, and re-exports of the common parts of heads on regions."""

from typing import Any

import torch
from torch import Tensor, nn

from d2lite.config import CfgNode, configurable
from d2lite.layers import ShapeSpec
from d2lite.modeling.poolers import ROIPooler
from d2lite.modeling.roi_heads.base import (
    ROI_HEADS_REGISTRY,
    ROIHeads,
    build_pooler,
    build_roi_heads,
    select_foreground_proposals,
)
from d2lite.modeling.roi_heads.box_head import build_box_head
from d2lite.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from d2lite.modeling.roi_heads.mask_head import build_mask_head
from d2lite.modeling.roi_heads.res5 import Res5ROIHeads
from d2lite.structures import Boxes, ImageList, Instances

__all__ = [
    "ROI_HEADS_REGISTRY",
    "ROIHeads",
    "Res5ROIHeads",
    "StandardROIHeads",
    "build_roi_heads",
    "select_foreground_proposals",
]


@ROI_HEADS_REGISTRY.register()
class StandardROIHeads(ROIHeads):
    """Boxes and optionally masks, each with its own pooling and layers: the heads of FPN models."""

    @configurable
    def __init__(
        self,
        *,
        box_in_features: list[str],
        box_pooler: ROIPooler,
        box_head: nn.Module,
        box_predictor: nn.Module,
        mask_in_features: list[str] | None = None,
        mask_pooler: ROIPooler | None = None,
        mask_head: nn.Module | None = None,
        train_on_pred_boxes: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            box_in_features: names of the feature maps for the boxes.
            box_pooler: pools them.
            box_head: from pooled features to the features of the predictor.
            box_predictor: from these to scores and boxes, see `FastRCNNOutputLayers`.
            mask_in_features: names of the feature maps for the masks.
            mask_pooler: pools them. Without it the mask head gets the dict of feature maps itself.
            mask_head: from pooled features to losses or masks; None: no masks.
            train_on_pred_boxes: train the mask head on the boxes that the box predictor gives.
            kwargs: see `ROIHeads`.
        """
        super().__init__(**kwargs)
        self.box_in_features = self.in_features = box_in_features
        self.box_pooler = box_pooler
        self.box_head = box_head
        self.box_predictor = box_predictor
        self.train_on_pred_boxes = train_on_pred_boxes
        self.mask_on = mask_in_features is not None
        if self.mask_on:
            self.mask_in_features = mask_in_features
            self.mask_pooler = mask_pooler
            self.mask_head = mask_head

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        return {
            **super().from_config(cfg),
            "train_on_pred_boxes": cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES,
            **cls._init_box_head(cfg, input_shape),
            **cls._init_mask_head(cfg, input_shape),
        }

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        pooler, shape = build_pooler(cfg, cfg.MODEL.ROI_BOX_HEAD, input_shape)
        head = build_box_head(cfg, shape)
        predictor = FastRCNNOutputLayers(cfg, head.output_shape)
        names = cfg.MODEL.ROI_HEADS.IN_FEATURES
        return {"box_in_features": names, "box_pooler": pooler, "box_head": head, "box_predictor": predictor}

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        if not cfg.MODEL.MASK_ON:
            return {}
        names = cfg.MODEL.ROI_HEADS.IN_FEATURES
        if cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE:
            pooler, shape = build_pooler(cfg, cfg.MODEL.ROI_MASK_HEAD, input_shape)
        else:
            pooler, shape = None, {name: input_shape[name] for name in names}
        return {"mask_in_features": names, "mask_pooler": pooler, "mask_head": build_mask_head(cfg, shape)}

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """See `ROIHeads`."""
        if not self.training:
            detections = self._forward_box(features, proposals)
            return self.forward_with_given_boxes(features, detections), {}
        assert targets is not None, "ROI heads need `targets` in training"
        sampled = self.label_and_sample_proposals(proposals, targets)
        box_losses = self._box_losses(features, sampled, targets)
        # the masks get the proposals that the boxes were trained on, not the boxes' predictions
        return sampled, {**box_losses, **self._forward_mask(features, sampled)}

    def forward_with_given_boxes(self, features: dict[str, Tensor], instances: list[Instances]) -> list[Instances]:
        """Predicts the masks of given boxes. Only outside training.

        Args:
            features: feature maps (N, C, H_i, W_i) by name.
            instances: N `Instances` with `pred_boxes` and `pred_classes`.

        Returns:
            The same, with the field `pred_masks` (R_i, 1, M, M) if the model has masks.
        """
        self._check_given_boxes(instances)
        return self._forward_mask(features, instances)

    def _box_losses(
        self, features: dict[str, Tensor], proposals: list[Instances], targets: list[Instances]
    ) -> dict[str, Tensor]:
        """Losses of the boxes for sampled proposals; heads that match boxes again need the `targets`."""
        return self._forward_box(features, proposals)

    def _forward_box(
        self, features: dict[str, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor] | list[Instances]:
        """Losses of the boxes, or N detections. May replace `proposal_boxes` by predictions in training."""
        predictor = self.box_predictor
        pooled = _pool(self.box_pooler, features, self.box_in_features, [x.proposal_boxes for x in proposals])
        predictions = predictor(self.box_head(pooled))
        if not self.training:
            return predictor.inference(predictions, proposals)[0]
        losses = predictor.losses(predictions, proposals)
        if self.train_on_pred_boxes:
            with torch.no_grad():
                for x, boxes in zip(proposals, predictor.predict_boxes_for_gt_classes(predictions, proposals)):
                    x.proposal_boxes = Boxes(boxes)
        return losses

    def _forward_mask(
        self, features: dict[str, Tensor], instances: list[Instances]
    ) -> dict[str, Tensor] | list[Instances]:
        """Losses of the masks for the foreground of `instances`, or `instances` with masks."""
        if not self.mask_on:
            return {} if self.training else instances
        boxes = "proposal_boxes" if self.training else "pred_boxes"
        if self.training:
            instances = select_foreground_proposals(instances, self.num_classes)[0]
        if self.mask_pooler is None:
            inputs = {name: features[name] for name in self.mask_in_features}
        else:
            inputs = _pool(self.mask_pooler, features, self.mask_in_features, [x.get(boxes) for x in instances])
        return self.mask_head(inputs, instances)


def _pool(pooler: ROIPooler, features: dict[str, Tensor], names: list[str], boxes: list[Boxes]) -> Tensor:
    return pooler([features[name] for name in names], boxes)
