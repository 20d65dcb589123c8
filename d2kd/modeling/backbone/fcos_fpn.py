"""BACKBONE "build_fcos_resnet_fpn_backbone": the pyramid of FCOS, whose P6 and P7 are made from P5."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_resnet_backbone
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelP6P7


def build_fcos_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """ResNet and FPN with two more levels from "p5" (arXiv 2006.09214, section 2.1), where RetinaNet takes "res5".

    Reads MODEL.RESNETS and MODEL.FPN.
    """
    node = cfg.MODEL.FPN
    return FPN(
        bottom_up=build_resnet_backbone(cfg, input_shape),
        in_features=node.IN_FEATURES,
        out_channels=node.OUT_CHANNELS,
        norm=node.NORM,
        top_block=LastLevelP6P7(node.OUT_CHANNELS, node.OUT_CHANNELS, in_feature="p5"),
        fuse_type=node.FUSE_TYPE,
    )


if "build_fcos_resnet_fpn_backbone" not in BACKBONE_REGISTRY:
    BACKBONE_REGISTRY.register(build_fcos_resnet_fpn_backbone)
