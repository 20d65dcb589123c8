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
from d2lite.modeling.postprocessing import detector_postprocess

__all__ = [
    "ANCHOR_GENERATOR_REGISTRY",
    "BACKBONE_REGISTRY",
    "Backbone",
    "FPN",
    "ResNet",
    "ResNetBlockBase",
    "SimpleFeaturePyramid",
    "ViT",
    "build_anchor_generator",
    "build_backbone",
    "build_resnet_backbone",
    "detector_postprocess",
    "get_vit_lr_decay_rate",
    "make_stage",
]
