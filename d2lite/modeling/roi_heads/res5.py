"""The heads of "C4" models, which share the last stage of a ResNet."""

from typing import Any

import torch
from torch import Tensor, nn

from d2lite.config import CfgNode, configurable
from d2lite.layers import ShapeSpec
from d2lite.modeling.backbone.resnet import BottleneckBlock, ResNet
from d2lite.modeling.poolers import ROIPooler
from d2lite.modeling.roi_heads.base import (
    ROI_HEADS_REGISTRY,
    ROIHeads,
    build_pooler,
    select_foreground_proposals,
)
from d2lite.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from d2lite.modeling.roi_heads.mask_head import build_mask_head
from d2lite.structures import Boxes, ImageList, Instances


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeads(ROIHeads):
    """The heads of "C4" models: the last ResNet stage runs on each region, shared by boxes and masks."""

    @configurable
    def __init__(
        self,
        *,
        in_features: list[str],
        pooler: ROIPooler,
        res5: nn.Module,
        box_predictor: nn.Module,
        mask_head: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            in_features: name of the one feature map.
            pooler: pools it.
            res5: from pooled features to the features of box predictor and mask head.
            box_predictor: from their spatial mean to scores and boxes, see `FastRCNNOutputLayers`.
            mask_head: from them to losses or masks; None: no masks.
            kwargs: see `ROIHeads`.
        """
        super().__init__(**kwargs)
        self.in_features = in_features
        self.pooler = pooler
        self.res5 = nn.Sequential(*res5) if isinstance(res5, (list, tuple)) else res5
        self.box_predictor = box_predictor
        self.mask_on = mask_head is not None
        if mask_head is not None:
            self.mask_head = mask_head

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        arguments = super().from_config(cfg)
        names = cfg.MODEL.ROI_HEADS.IN_FEATURES
        if len(names) != 1:
            raise ValueError(f"Res5ROIHeads uses one feature map, but MODEL.ROI_HEADS.IN_FEATURES is {list(names)}")
        pooler, pooled_shape = build_pooler(cfg, cfg.MODEL.ROI_BOX_HEAD, input_shape)
        res5, channels = cls._build_res5_block(cfg)
        arguments.update(in_features=names, pooler=pooler, res5=res5)
        arguments["box_predictor"] = FastRCNNOutputLayers(cfg, ShapeSpec(channels=channels, height=1, width=1))
        if cfg.MODEL.MASK_ON:
            shape = ShapeSpec(channels=channels, height=pooled_shape.height, width=pooled_shape.width)
            arguments["mask_head"] = build_mask_head(cfg, shape)
        return arguments

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Sequential, int]:
        """The last stage of the ResNet of the config, which its backbone lacks, and its output channels."""
        resnet = cfg.MODEL.RESNETS
        if resnet.DEFORM_ON_PER_STAGE[-1]:
            raise ValueError(
                "Res5ROIHeads has no deformable convolution: set the last of MODEL.RESNETS.DEFORM_ON_PER_STAGE to False"
            )
        factor = 2**3  # res5 has 8 times the channels of res2
        channels = resnet.RES2_OUT_CHANNELS * factor
        width = resnet.NUM_GROUPS * resnet.WIDTH_PER_GROUP * factor
        sizes = dict(in_channels=channels // 2, bottleneck_channels=width, out_channels=channels)
        kind = dict(num_groups=resnet.NUM_GROUPS, norm=resnet.NORM, stride_in_1x1=resnet.STRIDE_IN_1X1)
        blocks = ResNet.make_stage(BottleneckBlock, 3, stride_per_block=[2, 1, 1], **sizes, **kind)
        return nn.Sequential(*blocks), channels

    def _region_features(self, features: dict[str, Tensor], boxes: list[Boxes]) -> Tensor:
        return self.res5(self.pooler([features[name] for name in self.in_features], boxes))

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """See `ROIHeads`. In training the first result is empty."""
        predictor, used = self.box_predictor, proposals
        if self.training:
            assert targets is not None, "ROI heads need `targets` in training"
            used = self.label_and_sample_proposals(proposals, targets)
        shared = self._region_features(features, [x.proposal_boxes for x in used])
        predictions = predictor(shared.mean(dim=(2, 3)))
        if not self.training:
            return self.forward_with_given_boxes(features, predictor.inference(predictions, used)[0]), {}
        losses = predictor.losses(predictions, used)
        if self.mask_on:
            foreground, masks = select_foreground_proposals(used, self.num_classes)
            losses.update(self.mask_head(shared[torch.cat(masks)], foreground))
        return [], losses

    def forward_with_given_boxes(self, features: dict[str, Tensor], instances: list[Instances]) -> list[Instances]:
        """See `StandardROIHeads.forward_with_given_boxes`."""
        self._check_given_boxes(instances)
        if not self.mask_on:
            return instances
        return self.mask_head(self._region_features(features, [x.pred_boxes for x in instances]), instances)
