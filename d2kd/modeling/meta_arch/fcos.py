"""META_ARCHITECTURE "FCOS": Detectron2's FCOS (arXiv 1904.01355, 2006.09214), built from YAML."""

from typing import Any

from torch import nn

from d2kd.config import config_keys
from d2kd.errors import ConfigError
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.meta_arch import fcos


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
            ConfigError: `MODEL.FCOS.IN_FEATURES` names what the backbone does not give.
        """
        node = cfg.MODEL.FCOS
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "head": _build_head(node, backbone),
            "head_in_features": list(node.IN_FEATURES),
            "num_classes": node.NUM_CLASSES,
            "center_sampling_radius": node.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
            "test_score_thresh": node.SCORE_THRESH_TEST,
            "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": node.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "vis_period": cfg.VIS_PERIOD,
            "input_format": cfg.INPUT.FORMAT,
        }


def _build_head(node: CfgNode, backbone: Backbone) -> nn.Module:
    shapes = backbone.output_shape()
    unknown = [name for name in node.IN_FEATURES if name not in shapes]
    if unknown:
        raise ConfigError(
            f"MODEL.FCOS.IN_FEATURES names {', '.join(unknown)}, but the backbone (MODEL.BACKBONE.NAME) gives "
            f"{', '.join(shapes)}."
        )
    levels = [shapes[name] for name in node.IN_FEATURES]
    return fcos.FCOSHead(
        input_shape=levels,
        num_classes=node.NUM_CLASSES,
        conv_dims=[levels[0].channels] * node.NUM_CONVS,
        norm=node.NORM,
        prior_prob=node.PRIOR_PROB,
    )


@config_keys
def add_fcos_keys(cfg: CfgNode) -> None:
    """Adds MODEL.FCOS."""
    # META_ARCHITECTURE "FCOS", best with BACKBONE.NAME "build_fcos_resnet_fpn_backbone" (P6 and P7 from P5).
    node = cfg.MODEL.FCOS = CfgNode()
    node.NUM_CLASSES = 80
    # Levels of the pyramid that the head takes, finest first.
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Convolutions in each of the two branches of the head.
    node.NUM_CONVS = 4
    # Normalization in the head.
    node.NORM = "GN"
    # Only cells so near to the center of an object, in strides, learn it; 0 admits its whole box.
    node.CENTER_SAMPLING_RADIUS = 1.5
    # Score that the untrained head gives to every class.
    node.PRIOR_PROB = 0.01
    node.FOCAL_LOSS_ALPHA = 0.25
    node.FOCAL_LOSS_GAMMA = 2.0
    # Inference: least score (root of class score times centerness), candidates a level, overlap that suppresses.
    node.SCORE_THRESH_TEST = 0.2
    node.TOPK_CANDIDATES_TEST = 1000
    node.NMS_THRESH_TEST = 0.6


if "FCOS" not in META_ARCH_REGISTRY:
    META_ARCH_REGISTRY.register(FCOS)
