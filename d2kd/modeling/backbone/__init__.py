"""Backbones that Detectron2 lacks, or has no YAML for; importing registers them."""

from .fcos_fpn import build_fcos_resnet_fpn_backbone
from .last_norm import build_retinanet_resnet_fpn_last_norm_backbone
from .vit import build_vit_sfp_backbone, layer_decay_factor

__all__ = [
    "build_fcos_resnet_fpn_backbone",
    "build_retinanet_resnet_fpn_last_norm_backbone",
    "build_vit_sfp_backbone",
    "layer_decay_factor",
]
