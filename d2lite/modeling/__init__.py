"""Models and their parts: backbones, proposal generators, heads and whole detectors and segmentors."""

from d2lite.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, build_anchor_generator
from d2lite.modeling.backbone import (
    BACKBONE_REGISTRY,
    FPN,
    Backbone,
    ResNet,
    ResNetBlockBase,
    SimpleFeaturePyramid,
    ViT,
    build_backbone,
    build_resnet_backbone,
    get_vit_lr_decay_rate,
    make_stage,
)
from d2lite.modeling.meta_arch import (
    FCOS,
    META_ARCH_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    GeneralizedRCNN,
    PanopticFPN,
    ProposalNetwork,
    RetinaNet,
    SemanticSegmentor,
    build_model,
    build_sem_seg_head,
)
from d2lite.modeling.postprocessing import detector_postprocess

__all__ = [
    "ANCHOR_GENERATOR_REGISTRY",
    "BACKBONE_REGISTRY",
    "Backbone",
    "FCOS",
    "FPN",
    "GeneralizedRCNN",
    "META_ARCH_REGISTRY",
    "PanopticFPN",
    "ProposalNetwork",
    "ResNet",
    "ResNetBlockBase",
    "RetinaNet",
    "SEM_SEG_HEADS_REGISTRY",
    "SemanticSegmentor",
    "SimpleFeaturePyramid",
    "ViT",
    "build_anchor_generator",
    "build_backbone",
    "build_model",
    "build_resnet_backbone",
    "build_sem_seg_head",
    "detector_postprocess",
    "get_vit_lr_decay_rate",
    "make_stage",
]
