"""BACKBONE "build_vit_sfp_backbone": ViTDet's plain vision transformer and simple feature pyramid, from YAML."""

from collections.abc import Sequence
from functools import partial

from torch import nn

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid, ViT


def build_vit_sfp_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SimpleFeaturePyramid:
    """ViT and simple feature pyramid (arXiv 2203.16527): "p2" to "p5", and "p6" by pooling.

    Reads MODEL.VIT, MODEL.FPN.OUT_CHANNELS and MODEL.FPN.NORM. Parameters have ViTDet's names: "backbone.net..." and
    "backbone.simfp_2..." to "backbone.simfp_5...".

    Raises:
        ValueError: a value of MODEL.VIT is out of range.
    """
    node = cfg.MODEL.VIT
    return SimpleFeaturePyramid(
        net=build_vit(node, input_shape.channels),
        in_feature="last_feat",
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        scale_factors=tuple(node.SCALE_FACTORS),
        top_block=LastLevelMaxPool(),
        norm=cfg.MODEL.FPN.NORM,
        square_pad=node.SQUARE_PAD,
    )


def build_vit(node: CfgNode, in_channels: int) -> ViT:
    """The transformer that a node like MODEL.VIT describes; its output is "last_feat", of stride PATCH_SIZE.

    Raises:
        ValueError: a value of the node is out of range.
    """
    if node.EMBED_DIM % node.NUM_HEADS:
        raise ValueError(
            f"MODEL.VIT.EMBED_DIM is {node.EMBED_DIM}; it must be a multiple of MODEL.VIT.NUM_HEADS, {node.NUM_HEADS}."
        )
    if node.IMG_SIZE < node.PATCH_SIZE:
        raise ValueError(
            f"MODEL.VIT.IMG_SIZE is {node.IMG_SIZE}, less than one patch (MODEL.VIT.PATCH_SIZE {node.PATCH_SIZE})."
        )
    _check_blocks("WINDOW_BLOCK_INDEXES", node.WINDOW_BLOCK_INDEXES, node.DEPTH)
    _check_blocks("RESIDUAL_BLOCK_INDEXES", node.RESIDUAL_BLOCK_INDEXES, node.DEPTH)
    return ViT(
        img_size=node.IMG_SIZE,
        patch_size=node.PATCH_SIZE,
        in_chans=in_channels,
        embed_dim=node.EMBED_DIM,
        depth=node.DEPTH,
        num_heads=node.NUM_HEADS,
        mlp_ratio=node.MLP_RATIO,
        qkv_bias=node.QKV_BIAS,
        drop_path_rate=node.DROP_PATH_RATE,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_abs_pos=node.USE_ABS_POS,
        use_rel_pos=node.USE_REL_POS,
        window_size=node.WINDOW_SIZE,
        window_block_indexes=tuple(node.WINDOW_BLOCK_INDEXES),
        residual_block_indexes=tuple(node.RESIDUAL_BLOCK_INDEXES),
        use_act_checkpoint=node.USE_ACT_CHECKPOINT,
        pretrain_img_size=node.PRETRAIN_IMG_SIZE,
        pretrain_use_cls_token=node.PRETRAIN_USE_CLS_TOKEN,
        out_feature="last_feat",
    )


def _check_blocks(key: str, indexes: Sequence[int], depth: int) -> None:
    wrong = [i for i in indexes if not 0 <= i < depth]
    if wrong:
        raise ValueError(
            f"MODEL.VIT.{key} names the blocks {wrong}; there are {depth} (MODEL.VIT.DEPTH), counted from 0."
        )


if "build_vit_sfp_backbone" not in BACKBONE_REGISTRY:
    BACKBONE_REGISTRY.register(build_vit_sfp_backbone)
