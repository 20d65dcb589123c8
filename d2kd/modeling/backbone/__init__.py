"""Backbones that Detectron2 lacks, or has no YAML for; importing registers them."""

from .dilated_resnet import build_dilated_resnet_backbone
from .fcos_fpn import build_fcos_resnet_fpn_backbone
from .last_norm import build_retinanet_resnet_fpn_last_norm_backbone
from .layer_decay import layer_decay_factors
from .mobilenet_v2 import MobileNetV2, build_mobilenetv2_backbone
from .pixels import with_data_config
from .pretrained import find_network, load_bare_network, load_pretrained_network
from .reppoints_fpn import build_reppoints_resnet_fpn_backbone
from .timm_backbone import (
    TimmBackbone,
    build_fcos_timm_fpn_backbone,
    build_retinanet_timm_fpn_backbone,
    build_timm_backbone,
    build_timm_fpn_backbone,
)
from .torchvision_networks import TorchvisionNetwork
from .vit import build_vit_backbone, build_vit_sfp_backbone
from .whole_networks import TimmNetwork, WholeNetwork

__all__ = [
    "MobileNetV2",
    "TimmBackbone",
    "TimmNetwork",
    "TorchvisionNetwork",
    "WholeNetwork",
    "build_dilated_resnet_backbone",
    "build_fcos_resnet_fpn_backbone",
    "build_fcos_timm_fpn_backbone",
    "build_mobilenetv2_backbone",
    "build_reppoints_resnet_fpn_backbone",
    "build_retinanet_resnet_fpn_last_norm_backbone",
    "build_retinanet_timm_fpn_backbone",
    "build_timm_backbone",
    "build_timm_fpn_backbone",
    "build_vit_backbone",
    "build_vit_sfp_backbone",
    "find_network",
    "layer_decay_factors",
    "load_bare_network",
    "load_pretrained_network",
    "with_data_config",
]
