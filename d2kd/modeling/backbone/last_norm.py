"""BACKBONE "build_retinanet_resnet_fpn_last_norm_backbone": group norm in the last block of every stage."""

from torch import nn

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import build_retinanet_resnet_fpn_backbone


def build_retinanet_resnet_fpn_last_norm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """RetinaNet's ResNet and FPN, as the published student of channel matching has it (arXiv 2008.09958).

    In the last block of every stage that is not frozen, each norm is a GroupNorm of 32 groups, whose scale and shift
    start as those of the pretrained norm. Reads MODEL.RESNETS, MODEL.FPN and MODEL.BACKBONE.FREEZE_AT.
    Checkpoints fit this backbone only.
    """
    backbone = build_retinanet_resnet_fpn_backbone(cfg, input_shape)
    bottom_up = backbone.bottom_up
    for number, stage in enumerate(bottom_up.stage_names, start=2):
        if number > cfg.MODEL.BACKBONE.FREEZE_AT:
            _use_group_norm(getattr(bottom_up, stage)[-1])
    return backbone


def _use_group_norm(block: nn.Module) -> None:
    for convolution in block.children():
        if getattr(convolution, "norm", None) is not None:
            convolution.norm = get_norm("GN", convolution.out_channels)


if "build_retinanet_resnet_fpn_last_norm_backbone" not in BACKBONE_REGISTRY:
    BACKBONE_REGISTRY.register(build_retinanet_resnet_fpn_last_norm_backbone)
