"""BACKBONES "build_vit_backbone", ViTDet's plain vision transformer, and "build_vit_sfp_backbone", with its pyramid."""

from functools import partial

from torch import nn

from d2kd.config import config_check, declare_keys
from d2kd.errors import ConfigError
from d2kd.settings import DISTINCT, Rule, setting
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.vit import ViT

from .simple_pyramid import PaddedPyramid


def build_vit_sfp_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PaddedPyramid:
    """ViT and simple feature pyramid (arXiv 2203.16527): "p2" to "p5", and "p6" by pooling where there is a "p5".

    Reads MODEL.VIT, MODEL.FPN.OUT_CHANNELS and MODEL.FPN.NORM. Parameters have ViTDet's names: "backbone.net..." and
    "backbone.simfp_2..." to "backbone.simfp_5...".

    Raises:
        ConfigError: a value of MODEL.VIT is out of range.
    """
    node = cfg.MODEL.VIT
    return PaddedPyramid(
        net=build_vit(node, input_shape.channels),
        in_feature="last_feat",
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        scale_factors=tuple(node.SCALE_FACTORS),
        top_block=LastLevelMaxPool() if node.PATCH_SIZE / 32 in node.SCALE_FACTORS else None,  # it pools p5
        norm=cfg.MODEL.FPN.NORM,
        square_pad=node.SQUARE_PAD,
    )


class PaddedViT(ViT):
    """Detectron2's `ViT` as a backbone by itself: it says how images must be padded."""

    #: Images are padded to squares of this side in pixels; 0 pads to whole patches only.
    square_pad: int = 0

    @property
    def size_divisibility(self) -> int:
        """The side of a patch in pixels."""
        return int(self.patch_embed.proj.stride[0])

    @property
    def padding_constraints(self) -> dict[str, int]:
        """As Detectron2's backbones give them."""
        return {"size_divisibility": self.size_divisibility, "square_size": self.square_pad}


def build_vit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PaddedViT:
    """The transformer alone: "last_feat", of stride PATCH_SIZE. Reads MODEL.VIT.

    Raises:
        ConfigError: a value of MODEL.VIT is out of range.
    """
    network = build_vit(cfg.MODEL.VIT, input_shape.channels, PaddedViT)
    assert isinstance(network, PaddedViT)
    network.square_pad = cfg.MODEL.VIT.SQUARE_PAD
    return network


def build_vit(node: CfgNode, in_channels: int, of_class: type[ViT] = ViT) -> ViT:
    """The transformer that a node like MODEL.VIT describes; its output is "last_feat", of stride PATCH_SIZE.

    Raises:
        ConfigError: a value of the node is out of range.
    """
    check_vit_node(node)
    return of_class(
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


declare_keys(  # BACKBONE.NAME "build_vit_backbone" and "build_vit_sfp_backbone": here ViTDet's ViT-B
    "MODEL.VIT",
    IMG_SIZE=setting(
        1024, "Side of the nominal image, in pixels: sets the size of the tables of relative positions.", at_least=1
    ),
    PATCH_SIZE=setting(16, "Side of the patches that become tokens, in pixels.", at_least=1),
    EMBED_DIM=setting(768, "Channels of the tokens.", at_least=1),
    DEPTH=setting(12, "Transformer blocks.", at_least=1),
    NUM_HEADS=setting(12, "Heads of the attention; they divide EMBED_DIM.", at_least=1),
    MLP_RATIO=setting(4.0, "Hidden channels of the MLPs / EMBED_DIM.", above=0, at_most=1000),
    QKV_BIAS=setting(True, "Whether queries, keys and values have a bias."),
    DROP_PATH_RATE=setting(0.1, "Stochastic depth of the last block; it grows linearly from 0.", at_least=0, below=1),
    USE_ABS_POS=setting(True, "Absolute positions, of the pre-training."),
    USE_REL_POS=setting(True, "Relative positions, in every block."),
    WINDOW_SIZE=setting(14, "Side of the attention windows in patches.", at_least=1),
    WINDOW_BLOCK_INDEXES=setting(
        [0, 1, 3, 4, 6, 7, 9, 10],
        "The blocks that have windows, counted from 0; the others attend globally.",
        at_least=0,
        rule=DISTINCT,
    ),
    RESIDUAL_BLOCK_INDEXES=setting(
        [], "Blocks with a convolutional residual block behind them.", items=int, at_least=0, rule=DISTINCT
    ),
    USE_ACT_CHECKPOINT=setting(False, "Recompute the blocks in the backward pass: slower, less memory."),
    PRETRAIN_IMG_SIZE=setting(224, "Side of the images of the pre-training.", at_least=1),
    PRETRAIN_USE_CLS_TOKEN=setting(True, "Whether the table of positions of the pre-training has a class token."),
    SCALE_FACTORS=setting(
        [4.0, 2.0, 1.0, 0.5],
        "Sizes of the pyramid's levels relative to the transformer's map, finest first. p6 is pooled from p5, of "
        "stride 32, if that is among them.",
        rule=Rule(
            "must be consecutive ones of 4, 2, 1, 0.5",
            lambda values: 0 < len(values) and values == [x for x in (4, 2, 1, 0.5) if values[0] >= x >= values[-1]],
        ),
    ),
    SQUARE_PAD=setting(
        1024,
        "Images are padded to squares of this side; 0 pads to a multiple of the coarsest stride only.",
        at_least=0,
    ),
)


@config_check
def check_vit(cfg: CfgNode) -> None:
    """As `check_vit_node`, where the backbone is one of these; others may have it in another form."""
    if cfg.MODEL.BACKBONE.NAME in ("build_vit_backbone", "build_vit_sfp_backbone"):
        check_vit_node(cfg.MODEL.VIT)


def check_vit_node(node: CfgNode) -> None:
    """
    Raises:
        ConfigError: values of a node like MODEL.VIT do not go together.
    """
    if node.EMBED_DIM % node.NUM_HEADS:
        raise ConfigError(
            f"MODEL.VIT.EMBED_DIM is {node.EMBED_DIM}; it must be a multiple of MODEL.VIT.NUM_HEADS, {node.NUM_HEADS}."
        )
    if node.IMG_SIZE < node.PATCH_SIZE:
        raise ConfigError(
            f"MODEL.VIT.IMG_SIZE is {node.IMG_SIZE}, less than one patch (MODEL.VIT.PATCH_SIZE {node.PATCH_SIZE})."
        )
    for key in ("WINDOW_BLOCK_INDEXES", "RESIDUAL_BLOCK_INDEXES"):
        wrong = [i for i in node[key] if not 0 <= i < node.DEPTH]
        if wrong:
            raise ConfigError(
                f"MODEL.VIT.{key} names the blocks {wrong}; there are {node.DEPTH} (MODEL.VIT.DEPTH), counted from 0."
            )


for _build in (build_vit_backbone, build_vit_sfp_backbone):
    if _build.__name__ not in BACKBONE_REGISTRY:
        BACKBONE_REGISTRY.register(_build)
