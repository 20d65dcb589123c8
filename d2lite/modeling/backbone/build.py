"""Registry and builder of backbones."""

from fvcore.common.config import CfgNode

from d2lite.layers import ShapeSpec
from d2lite.modeling.backbone.backbone import Backbone
from d2lite.utils.registry import Registry

BACKBONE_REGISTRY = Registry("BACKBONE")
BACKBONE_REGISTRY.__doc__ = "Callables (cfg, input_shape: ShapeSpec) -> Backbone, by MODEL.BACKBONE.NAME."


def build_backbone(cfg: CfgNode, input_shape: ShapeSpec | None = None) -> Backbone:
    """Builds the backbone that `cfg.MODEL.BACKBONE.NAME` names.

    Args:
        cfg: the full config.
        input_shape: shape of the images; by default as many channels as `cfg.MODEL.PIXEL_MEAN` has values.

    Raises:
        KeyError: if no backbone of that name is registered.
        AssertionError: if the result is not a `Backbone`.
    """
    if input_shape is None:
        input_shape = ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN))
    name = cfg.MODEL.BACKBONE.NAME
    backbone = BACKBONE_REGISTRY.get(name)(cfg, input_shape)
    if not isinstance(backbone, Backbone):
        raise AssertionError(f"MODEL.BACKBONE.NAME {name!r} built a {type(backbone).__name__}, not a Backbone")
    return backbone
