"""Heads that classify, refine and segment region proposals."""

from d2lite.modeling.roi_heads.base import (
    ROI_HEADS_REGISTRY,
    ROIHeads,
    build_roi_heads,
    select_foreground_proposals,
)
from d2lite.modeling.roi_heads.box_head import ROI_BOX_HEAD_REGISTRY, FastRCNNConvFCHead, build_box_head
from d2lite.modeling.roi_heads.cascade_rcnn import CascadeROIHeads
from d2lite.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from d2lite.modeling.roi_heads.mask_head import (
    ROI_MASK_HEAD_REGISTRY,
    BaseMaskRCNNHead,
    MaskRCNNConvUpsampleHead,
    build_mask_head,
)
from d2lite.modeling.roi_heads.res5 import Res5ROIHeads
from d2lite.modeling.roi_heads.roi_heads import StandardROIHeads

__all__ = [
    "BaseMaskRCNNHead",
    "CascadeROIHeads",
    "FastRCNNConvFCHead",
    "FastRCNNOutputLayers",
    "MaskRCNNConvUpsampleHead",
    "ROIHeads",
    "ROI_BOX_HEAD_REGISTRY",
    "ROI_HEADS_REGISTRY",
    "ROI_MASK_HEAD_REGISTRY",
    "Res5ROIHeads",
    "StandardROIHeads",
    "build_box_head",
    "build_mask_head",
    "build_roi_heads",
    "select_foreground_proposals",
]
