"""BACKBONE "build_timm_backbone" and its pyramids: any network of timm that gives feature maps, from YAML."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from d2kd.config import config_check
from d2kd.errors import ConfigError, require_choice
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7

from .pixels import log_pixels
from .simple_pyramid import PaddedPyramid
from .timm_networks import (
    TIMM_BACKBONES,
    Stage,
    arguments_of,
    change_strides,
    check_name,
    create_features,
    feature_stages,
    find_module,
    freeze,
    gives_nhwc,
    layers_to_the_end,
    set_norms,
)
from .timm_weights import read_pretrained

logger = logging.getLogger(__name__)


class TimmBackbone(Backbone):
    """A network of timm as a Detectron2 backbone: the stages of its trunk by stride, "res2" (4) to "res5" (32).

    Attributes:
        net: timm's network, with its parameter names.
    """

    #: Node of the configuration that describes it.
    NODE = "MODEL.TIMM"

    def __init__(
        self,
        name: str,
        out_features: Sequence[str],
        *,
        arguments: Mapping[str, Any] | None = None,
        strides: Sequence[Any] = (),
        norm: str = "BN",
        freeze_at: int = 0,
        in_channels: int = 3,
    ) -> None:
        """
        Args:
            name: of the network, as timm.create_model takes it.
            out_features: its outputs; see `timm_networks.feature_stages`.
            arguments: further ones of timm.create_model.
            strides: of convolutions to change, [path, stride, ...].
            norm: see `timm_networks.NORMS`.
            freeze_at: see `timm_networks.freeze`.
            in_channels: of the images.

        Raises:
            ConfigError: there is no such network, feature or argument.
        """
        super().__init__()
        self.name = name
        self.arguments = {**(arguments or {}), **({} if in_channels == 3 else {"in_chans": in_channels})}
        self._stages = feature_stages(name, self.arguments, strides)
        for feature in out_features:
            require_choice("MODEL.TIMM.OUT_FEATURES", feature, self._stages, f" These are the stages of {name}.")
        self._out_features = [feature for feature in self._stages if feature in out_features]  # finest first
        self._build_arguments = {
            **self.arguments,
            "out_indices": tuple(self._stages[feature].place for feature in self._out_features),
        }
        net = create_features(name, **self._build_arguments)
        self._nhwc = gives_nhwc(net)
        change_strides(net, strides)
        self.net = set_norms(net, norm)
        freeze(self.net, self._stages, freeze_at)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """
        Args:
            images: (N, C, H, W), normalized.

        Returns:
            (N, C_i, H_i, W_i) by feature.
        """
        maps = self.net(images)
        if self._nhwc:
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        return dict(zip(self._out_features, maps))

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Returns channels and strides of the outputs, finest first."""
        return {name: shape_of(self._stages[name]) for name in self._out_features}

    @property
    def size_divisibility(self) -> int:
        """What images are padded to a multiple of: the coarsest stride."""
        return max(self._stages[name].stride for name in self._out_features)

    @property
    def stage_names(self) -> list[str]:
        """All stages that can be tapped, also those that are no outputs."""
        return [name for name in self._stages if name in self._out_features or self.stage_module(name) is not None]

    def stage_module(self, stage: str) -> nn.Module | None:
        """Returns the module that ends a stage; None where there is none of that name, or it was not built."""
        return find_module(self.net, self._stages[stage].module) if stage in self._stages else None

    def is_channels_last(self, module: nn.Module) -> bool:
        """Returns whether a module of the network gives (N, H, W, C)."""
        return self._nhwc and not isinstance(module, nn.Conv2d)

    def layers_to_the_end(self) -> dict[str, int]:
        """Returns how many layers lie between each parameter and the neck, for `SOLVER.LAYER_DECAY`."""
        names = [name for name, _ in self.net.named_parameters()]
        return {f"net.{n}": i + 1 for n, i in layers_to_the_end(self.name, self.arguments, names).items()}

    def load_pretrained(self, weights: str | Mapping[str, Tensor]) -> list[str]:
        """Loads what `MODEL.TIMM.WEIGHTS` names, or weights that were read already.

        Returns:
            The names of parameters that they do not fill.

        Raises:
            ConfigError: it cannot be loaded.
        """
        pretrained = read_pretrained(create_features, self.name, weights, self._build_arguments)
        for key, tensor in self.net.state_dict().items():
            tensor.copy_(pretrained.state[key])
        return pretrained.left


def shape_of(stage: Stage) -> ShapeSpec:
    """Returns a stage's channels and stride as Detectron2 has them."""
    return ShapeSpec(channels=stage.channels, stride=stage.stride)


def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """The network of MODEL.TIMM, without a neck; its outputs are MODEL.TIMM.OUT_FEATURES.

    Raises:
        ConfigError: MODEL.TIMM does not describe a network of timm.
    """
    node = cfg.MODEL.TIMM
    backbone = TimmBackbone(
        node.NAME,
        node.OUT_FEATURES,
        arguments=arguments_of(node),
        strides=node.STRIDES,
        norm=node.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        in_channels=input_shape.channels,
    )
    shapes = ", ".join(f"{n} {s.channels} / {s.stride}" for n, s in backbone.output_shape().items())
    logger.info("Backbone %s of timm (channels / stride): %s", node.NAME, shapes)
    log_pixels(cfg)
    return backbone


def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """The network of MODEL.TIMM and a pyramid "p2" to "p5", with "p6" by pooling, as R-CNNs have it.

    Reads MODEL.FPN. On a network of one stride, such as a plain vision transformer, it is the simple feature pyramid of
    ViTDet (arXiv 2203.16527).
    """
    return _pyramid(cfg, input_shape, None)


def build_retinanet_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """As `build_timm_fpn_backbone`, with "p6" and "p7" made from "res5", as RetinaNet has it (arXiv 1708.02002)."""
    return _pyramid(cfg, input_shape, "res5")


def build_fcos_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """As `build_timm_fpn_backbone`, with "p6" and "p7" made from "p5" (arXiv 2006.09214, section 2.1)."""
    return _pyramid(cfg, input_shape, "p5")


def _pyramid(cfg: CfgNode, input_shape: ShapeSpec, extra_from: str | None) -> nn.Module:
    """A neck on the network; `extra_from` says what P6 and P7 are made from, None pools P6."""
    bottom_up, node = build_timm_backbone(cfg, input_shape), cfg.MODEL.FPN
    shapes = bottom_up.output_shape()
    if list(shapes) == ["last_feat"]:
        return _simple_pyramid(cfg, bottom_up, with_p7=extra_from is not None)
    for name in node.IN_FEATURES:
        require_choice("MODEL.FPN.IN_FEATURES", name, shapes, " These are MODEL.TIMM.OUT_FEATURES.")
    strides = [shapes[name].stride for name in node.IN_FEATURES]
    if any(b != 2 * a for a, b in zip(strides, strides[1:])):
        raise ConfigError(
            f"MODEL.FPN.IN_FEATURES {list(node.IN_FEATURES)} have the strides {strides} in {bottom_up.name}; a pyramid "
            "needs each to be twice the one before. Leave some out, or change MODEL.TIMM.ARGS (output_stride)."
        )
    top: nn.Module = LastLevelMaxPool()
    if extra_from is not None:
        channels = shapes[extra_from].channels if extra_from in shapes else node.OUT_CHANNELS
        if extra_from.startswith("res") and extra_from not in node.IN_FEATURES:
            raise ConfigError(
                f"MODEL.FPN.IN_FEATURES is {list(node.IN_FEATURES)}; p6 is made from {extra_from}, which must be the "
                "last of them."
            )
        top = LastLevelP6P7(channels, node.OUT_CHANNELS, in_feature=extra_from)
    return FPN(
        bottom_up=bottom_up,
        in_features=node.IN_FEATURES,
        out_channels=node.OUT_CHANNELS,
        norm=node.NORM,
        top_block=top,
        fuse_type=node.FUSE_TYPE,
    )


def _simple_pyramid(cfg: CfgNode, bottom_up: TimmBackbone, with_p7: bool) -> PaddedPyramid:
    node, stride = cfg.MODEL.FPN, bottom_up.output_shape()["last_feat"].stride
    if stride not in (16, 32):
        raise ConfigError(
            f"MODEL.TIMM.NAME {bottom_up.name} has patches of {stride} pixels; a simple feature pyramid needs 16 or 32."
        )
    finest = 8 if with_p7 else 4  # heads with p7 have no p2
    factors = [scale for scale in (4.0, 2.0, 1.0, 0.5) if finest <= stride / scale <= 32]
    top = LastLevelP6P7(node.OUT_CHANNELS, node.OUT_CHANNELS, in_feature="p5") if with_p7 else LastLevelMaxPool()
    return PaddedPyramid(
        net=bottom_up,
        in_feature="last_feat",
        out_channels=node.OUT_CHANNELS,
        scale_factors=tuple(factors),
        top_block=top,
        norm=node.NORM or "LN",
        square_pad=0,
    )


@config_check
def check_timm(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: the backbone is one of timm's, and there is no network of that name, or ARGS has what other keys
            decide.
    """
    if cfg.MODEL.BACKBONE.NAME in TIMM_BACKBONES:
        check_name(cfg.MODEL.TIMM.NAME)
        arguments_of(cfg.MODEL.TIMM)


for _build in (
    build_timm_backbone,
    build_timm_fpn_backbone,
    build_retinanet_timm_fpn_backbone,
    build_fcos_timm_fpn_backbone,
):
    if _build.__name__ not in BACKBONE_REGISTRY:
        BACKBONE_REGISTRY.register(_build)
