"""BACKBONE "build_vit_sfp_backbone": ViTDet's plain vision transformer and simple feature pyramid, from YAML."""

from collections.abc import Sequence
from functools import partial

from torch import nn

from d2kd.config import config_keys
from d2kd.errors import ConfigError
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid, ViT, get_vit_lr_decay_rate


def build_vit_sfp_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SimpleFeaturePyramid:
    """ViT and simple feature pyramid (arXiv 2203.16527): "p2" to "p5", and "p6" by pooling.

    Reads MODEL.VIT, MODEL.FPN.OUT_CHANNELS and MODEL.FPN.NORM. Parameters have ViTDet's names: "backbone.net..." and
    "backbone.simfp_2..." to "backbone.simfp_5...".

    Raises:
        ConfigError: a value of MODEL.VIT is out of range.
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
        ConfigError: a value of the node is out of range.
    """
    if node.EMBED_DIM % node.NUM_HEADS:
        raise ConfigError(
            f"MODEL.VIT.EMBED_DIM is {node.EMBED_DIM}; it must be a multiple of MODEL.VIT.NUM_HEADS, {node.NUM_HEADS}."
        )
    if node.IMG_SIZE < node.PATCH_SIZE:
        raise ConfigError(
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


def layer_decay_factor(cfg: CfgNode, name: str) -> float:
    """Returns the factor on the learning rate of a parameter of the model, by `SOLVER.LAYER_DECAY` (arXiv 2106.08254).

    It is 1 for what does not lie in the transformer.
    """
    return get_vit_lr_decay_rate(name, cfg.SOLVER.LAYER_DECAY, cfg.MODEL.VIT.DEPTH)


def _check_blocks(key: str, indexes: Sequence[int], depth: int) -> None:
    wrong = [i for i in indexes if not 0 <= i < depth]
    if wrong:
        raise ConfigError(
            f"MODEL.VIT.{key} names the blocks {wrong}; there are {depth} (MODEL.VIT.DEPTH), counted from 0."
        )


@config_keys
def add_vit_keys(cfg: CfgNode) -> None:
    """Adds MODEL.VIT."""
    # BACKBONE.NAME "build_vit_sfp_backbone": ViTDet's transformer, here ViT-B, and its pyramid (FPN.OUT_CHANNELS,
    # FPN.NORM).
    node = cfg.MODEL.VIT = CfgNode()
    # Side of the nominal image, in pixels: sets the size of the tables of relative positions.
    node.IMG_SIZE = 1024
    node.PATCH_SIZE = 16
    # Channels of the tokens, transformer blocks, heads, and hidden channels of the MLPs / EMBED_DIM.
    node.EMBED_DIM = 768
    node.DEPTH = 12
    node.NUM_HEADS = 12
    node.MLP_RATIO = 4.0
    node.QKV_BIAS = True
    # Stochastic depth of the last block; it grows linearly from 0.
    node.DROP_PATH_RATE = 0.1
    # Absolute positions of the pre-training, and relative ones in every block.
    node.USE_ABS_POS = True
    node.USE_REL_POS = True
    # Side of the attention windows in patches, and the blocks that have them; the others attend globally.
    node.WINDOW_SIZE = 14
    node.WINDOW_BLOCK_INDEXES = [0, 1, 3, 4, 6, 7, 9, 10]
    # Blocks with a convolutional residual block behind them.
    node.RESIDUAL_BLOCK_INDEXES = []
    # Recompute the blocks in the backward pass: slower, less memory.
    node.USE_ACT_CHECKPOINT = False
    # Side of the images of the pre-training, and whether its table of positions has a class token.
    node.PRETRAIN_IMG_SIZE = 224
    node.PRETRAIN_USE_CLS_TOKEN = True
    # Sizes of the pyramid's levels relative to the transformer's map.
    node.SCALE_FACTORS = [4.0, 2.0, 1.0, 0.5]
    # Images are padded to squares of this side; 0 pads to a multiple of the coarsest stride only.
    node.SQUARE_PAD = 1024


if "build_vit_sfp_backbone" not in BACKBONE_REGISTRY:
    BACKBONE_REGISTRY.register(build_vit_sfp_backbone)
