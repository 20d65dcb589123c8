"""The keys of MODEL.REPPOINTS, and the head that they describe."""

from d2kd.config import declare_keys
from d2kd.detectron2_keys import NORMS
from d2kd.errors import ConfigError
from d2kd.settings import NOT_EMPTY, SORTED, Rule, setting
from detectron2.config import CfgNode
from detectron2.modeling import Backbone

from ..levels import levels_of
from .head import RepPointsHead
from .points import TRANSFORMS


def build_head(node: CfgNode, backbone: Backbone) -> RepPointsHead:
    """Returns the head for a backbone.

    Args:
        node: MODEL.REPPOINTS.
        backbone: whose features IN_FEATURES names.

    Raises:
        ConfigError: the backbone lacks one of them, their strides are no pyramid's, or NORM does not fit CONV_DIM.
    """
    levels = levels_of(backbone, "MODEL.REPPOINTS.IN_FEATURES", node.IN_FEATURES)
    strides = [int(level.stride or 0) for level in levels]
    if any(stride < 1 or stride & (stride - 1) for stride in strides) or any(
        coarse != 2 * fine for fine, coarse in zip(strides, strides[1:])
    ):
        raise ConfigError(
            f"MODEL.REPPOINTS.IN_FEATURES is {list(node.IN_FEATURES)}, of strides {strides}; they must be powers of 2, "
            "each twice the one before."
        )
    if node.NORM == "GN" and node.CONV_DIM % 32:
        raise ConfigError(
            f"MODEL.REPPOINTS.NORM is GN, which needs a multiple of 32 channels; MODEL.REPPOINTS.CONV_DIM is "
            f"{node.CONV_DIM}."
        )
    return RepPointsHead(
        in_channels=int(levels[0].channels or 0),
        num_classes=node.NUM_CLASSES,
        conv_dim=node.CONV_DIM,
        point_dim=node.POINT_DIM,
        num_convs=node.NUM_CONVS,
        num_points=node.NUM_POINTS,
        norm=node.NORM,
        prior_prob=node.PRIOR_PROB,
        gradient_multiplier=node.GRADIENT_MULTIPLIER,
    )


declare_keys(  # META_ARCHITECTURE "RepPoints", best with BACKBONE.NAME "build_reppoints_resnet_fpn_backbone"
    "MODEL.REPPOINTS",
    NUM_CLASSES=setting(80, "Classes.", at_least=1),
    IN_FEATURES=setting(
        ["p3", "p4", "p5", "p6", "p7"], "Levels of the pyramid that the head takes, finest first.", rule=NOT_EMPTY
    ),
    NUM_CONVS=setting(3, "Convolutions in each of the two branches of the head.", at_least=0),
    CONV_DIM=setting(256, "Channels of these convolutions.", at_least=1),
    POINT_DIM=setting(256, "Channels of the convolutions that read features at the points.", at_least=1),
    NORM=setting("GN", "Normalization in the head.", choices=NORMS),
    NUM_POINTS=setting(9, "Points of an object: the square of an odd number.", choices=(9, 25, 49)),
    TRANSFORM=setting(
        "moment",
        "Box of the points. moment: around their mean, with learned multiples of their deviation | minmax: around all "
        "of them | partial_minmax: around the first four.",
        choices=TRANSFORMS,
    ),
    MOMENT_MULTIPLIER=setting(
        0.01, "Factor on the gradient of the two learned multiples of moment.", at_least=0, at_most=1
    ),
    GRADIENT_MULTIPLIER=setting(
        0.1, "Factor on the gradient that the first points get from what is read there.", at_least=0, at_most=1
    ),
    BASE_SCALE=setting(
        4.0, "Sides of an object, in strides, on the level that learns it; the unit of box errors.", above=0
    ),
    LOCATIONS_PER_OBJECT=setting(1, "Locations that learn the first points of an object.", at_least=1),
    IOU_THRESHOLDS=setting(
        [0.4, 0.5],
        "Overlaps of the box of the first points with an object: below the first, a location learns the background, "
        "from the second on the object, in between no class.",
        at_least=0,
        at_most=1,
        rule=Rule("must be two numbers, ascending", lambda values: len(values) == 2 and SORTED.holds(values)),
    ),
    PRIOR_PROB=setting(0.01, "Score that the untrained head gives to every class.", above=0, below=1),
    FOCAL_LOSS_ALPHA=setting(
        0.25, "Weight of objects against background in the loss; -1 weighs both alike.", at_least=-1, at_most=1
    ),
    FOCAL_LOSS_GAMMA=setting(2.0, "How little what is right already counts in the loss.", at_least=0, at_most=100),
    SMOOTH_L1_BETA=setting(
        0.11,
        "Where the loss of boxes turns from quadratic to linear, in sides of BASE_SCALE strides; 0 is plain L1.",
        at_least=0,
    ),
    INITIAL_LOSS_WEIGHT=setting(0.5, "Factor on the loss of the first points.", at_least=0),
    REFINED_LOSS_WEIGHT=setting(1.0, "Factor on the loss of the refined points.", at_least=0),
    SCORE_THRESH_TEST=setting(0.05, "Least score of a detection; negative admits all.", at_least=-1, below=1),
    TOPK_CANDIDATES_TEST=setting(1000, "Candidates of a level.", at_least=1),
    NMS_THRESH_TEST=setting(0.5, "Overlap that suppresses the weaker of two detections.", above=0, at_most=1),
)
