"""META_ARCHITECTURE "FCOS": Detectron2's FCOS (arXiv 1904.01355, 2006.09214), built from YAML."""

from typing import Any

from torch import nn

from d2kd.config import declare_keys
from d2kd.detectron2_keys import NORMS
from d2kd.settings import NOT_EMPTY, setting
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.meta_arch import fcos

from .dense_arguments import dense_arguments
from .levels import check_group_norm, levels_of


class FCOS(fcos.FCOS):
    """Detectron2's FCOS, with its parameter names, from the node MODEL.FCOS."""

    num_classes_key = "MODEL.FCOS.NUM_CLASSES"

    @configurable
    def __init__(self, *, vis_period: int = 0, input_format: str = "BGR", **kwargs: Any) -> None:
        """
        Args:
            vis_period: iterations between pictures of the training; 0 makes none.
            input_format: channel order of the images, for those pictures.
            kwargs: of Detectron2's FCOS.
        """
        super().__init__(**kwargs)
        self.vis_period = vis_period
        self.input_format = input_format

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Constructor arguments from the configuration.

        Raises:
            ConfigError: `MODEL.FCOS.IN_FEATURES` names what the backbone does not give, or NORM does not fit it.
        """
        node = cfg.MODEL.FCOS
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "head": _build_head(node, backbone),
            "center_sampling_radius": node.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
            **dense_arguments(cfg, node),
        }


def _build_head(node: CfgNode, backbone: Backbone) -> nn.Module:
    levels = levels_of(backbone, "MODEL.FCOS.IN_FEATURES", node.IN_FEATURES)
    check_group_norm("MODEL.FCOS.NORM", node.NORM, node.IN_FEATURES[0], levels[0])
    return fcos.FCOSHead(
        input_shape=levels,
        num_classes=node.NUM_CLASSES,
        conv_dims=[levels[0].channels] * node.NUM_CONVS,
        norm=node.NORM,
        prior_prob=node.PRIOR_PROB,
    )


declare_keys(  # META_ARCHITECTURE "FCOS", best with BACKBONE.NAME "build_fcos_resnet_fpn_backbone" (P6 and P7 from P5)
    "MODEL.FCOS",
    NUM_CLASSES=setting(80, "Classes.", at_least=1),
    IN_FEATURES=setting(
        ["p3", "p4", "p5", "p6", "p7"], "Levels of the pyramid that the head takes, finest first.", rule=NOT_EMPTY
    ),
    NUM_CONVS=setting(4, "Convolutions in each of the two branches of the head.", at_least=1),
    NORM=setting("GN", "Normalization in the head.", choices=NORMS),
    CENTER_SAMPLING_RADIUS=setting(
        1.5,
        "Only cells so near to the center of an object, in strides, learn it; 0 admits its whole box.",
        at_least=0,
        at_most=1000,
    ),
    PRIOR_PROB=setting(0.01, "Score that the untrained head gives to every class.", above=0, below=1),
    FOCAL_LOSS_ALPHA=setting(
        0.25, "Weight of objects against background in the loss; -1 weighs both alike.", at_least=-1, at_most=1
    ),
    FOCAL_LOSS_GAMMA=setting(2.0, "How little what is right already counts in the loss.", at_least=0, at_most=100),
    SCORE_THRESH_TEST=setting(
        0.2,
        "Least score (root of class score times centerness) of a detection; negative admits all.",
        at_least=-1,
        below=1,
    ),
    TOPK_CANDIDATES_TEST=setting(1000, "Candidates of a level.", at_least=1),
    NMS_THRESH_TEST=setting(0.6, "Overlap that suppresses the weaker of two detections.", above=0, at_most=1),
)


if "FCOS" not in META_ARCH_REGISTRY:
    META_ARCH_REGISTRY.register(FCOS)
