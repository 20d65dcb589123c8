"""Whole models: from a list of dataset dicts to losses or predictions."""

from d2lite.modeling.meta_arch.build import META_ARCH_REGISTRY, build_model
from d2lite.modeling.meta_arch.fcos import FCOS, FCOSHead
from d2lite.modeling.meta_arch.panoptic_fpn import PanopticFPN, combine_semantic_and_instance_outputs
from d2lite.modeling.meta_arch.rcnn import GeneralizedRCNN, ProposalNetwork
from d2lite.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from d2lite.modeling.meta_arch.semantic_seg import (
    SEM_SEG_HEADS_REGISTRY,
    SemanticSegmentor,
    SemSegFPNHead,
    build_sem_seg_head,
)

__all__ = [
    "FCOS",
    "META_ARCH_REGISTRY",
    "SEM_SEG_HEADS_REGISTRY",
    "FCOSHead",
    "GeneralizedRCNN",
    "PanopticFPN",
    "ProposalNetwork",
    "RetinaNet",
    "RetinaNetHead",
    "SemSegFPNHead",
    "SemanticSegmentor",
    "build_model",
    "build_sem_seg_head",
    "combine_semantic_and_instance_outputs",
]
