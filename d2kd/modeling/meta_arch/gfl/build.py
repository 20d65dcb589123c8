"""The keys of MODEL.GFL, and the head that they describe."""

from d2kd.config import declare_keys
from d2kd.detectron2_keys import NORMS
from d2kd.errors import ConfigError
from d2kd.settings import NOT_EMPTY, setting
from detectron2.config import CfgNode
from detectron2.modeling import Backbone

from ..levels import check_group_norm, levels_of
from .head import GFLHead


def build_head(node: CfgNode, backbone: Backbone) -> GFLHead:
    """Returns the head for a backbone.

    Args:
        node: MODEL.GFL.
        backbone: whose features IN_FEATURES names.

    Raises:
        ConfigError: the backbone lacks one of them or does not tell its stride, or NORM does not fit their channels.
    """
    levels = levels_of(backbone, "MODEL.GFL.IN_FEATURES", node.IN_FEATURES)
    if not all(level.stride for level in levels):
        raise ConfigError(
            f"MODEL.GFL.IN_FEATURES is {list(node.IN_FEATURES)}, and the backbone (MODEL.BACKBONE.NAME) does not tell "
            "all of their strides (`output_shape`), which distances are measured in."
        )
    check_group_norm("MODEL.GFL.NORM", node.NORM, node.IN_FEATURES[0], levels[0])
    return GFLHead(
        input_shape=levels,
        num_classes=node.NUM_CLASSES,
        conv_dims=[levels[0].channels] * node.NUM_CONVS,
        num_bins=node.NUM_BINS,
        norm=node.NORM,
        prior_prob=node.PRIOR_PROB,
    )


declare_keys(  # META_ARCHITECTURE "GFL", best with BACKBONE.NAME "build_fcos_resnet_fpn_backbone" (P6 and P7 from P5)
    "MODEL.GFL",
    NUM_CLASSES=setting(80, "Classes.", at_least=1),
    IN_FEATURES=setting(
        ["p3", "p4", "p5", "p6", "p7"], "Levels of the pyramid that the head takes, finest first.", rule=NOT_EMPTY
    ),
    NUM_CONVS=setting(4, "Convolutions in each of the two branches of the head.", at_least=1),
    NORM=setting("GN", "Normalization in the head.", choices=NORMS),
    NUM_BINS=setting(
        17,
        "Whole numbers of strides, from 0, that the distance to a side of a box is a mean of; no side is farther than "
        "the last one.",
        at_least=2,
        at_most=1000,
    ),
    CELL_OFFSET=setting(
        0.0,
        "Where in a cell its center is, in strides from its upper left corner: 0 as in the released models, 0.5 in the "
        "middle.",
        at_least=0,
        below=1,
    ),
    ANCHOR_SCALE=setting(8.0, "Side of a cell's anchor, by which it is given an object, in strides.", above=0),
    CANDIDATES_PER_LEVEL=setting(
        9, "Cells of each level, the nearest to an object's center, that it may be given to.", at_least=1
    ),
    PRIOR_PROB=setting(0.01, "Score that the untrained head gives to every class.", above=0, below=1),
    QUALITY_FOCAL_LOSS_BETA=setting(
        2.0, "How little what is right already counts in the loss of scores.", at_least=0, at_most=10
    ),
    BOX_LOSS_WEIGHT=setting(2.0, "Factor on the loss of boxes (GIoU).", at_least=0),
    DISTRIBUTION_LOSS_WEIGHT=setting(0.25, "Factor on the loss of their distributions.", at_least=0),
    SCORE_THRESH_TEST=setting(0.05, "Least score of a detection; negative admits all.", at_least=-1, below=1),
    TOPK_CANDIDATES_TEST=setting(1000, "Candidates of a level.", at_least=1),
    NMS_THRESH_TEST=setting(0.6, "Overlap that suppresses the weaker of two detections.", above=0, at_most=1),
)
