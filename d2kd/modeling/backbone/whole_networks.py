"""BACKBONE "build_timm_network": whole classifiers with their own pooling and head, of timm here."""

import contextlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2kd.config import config_check
from d2kd.errors import ConfigError
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

from .pixels import log_pixels
from .timm_networks import (
    Stage,
    arguments_of,
    change_strides,
    create,
    find_module,
    first_line,
    freeze,
    gives_nhwc,
    image_channels,
    layers_to_the_end,
    network_stages,
    set_norms,
)
from .timm_weights import read_pretrained

#: Side of images that shows whether a network takes those of other sizes than its own, in pixels; taps are described
#: at this size too, see `Architecture.probe_size`.
_ANY_SIDE = 128


class WholeNetwork(Backbone):
    """A classifier of another library as a Detectron2 backbone; its output is "class_logits", (N, classes).

    Attributes:
        net: the network, with its library's parameter names.
        num_classes: of its classifier.
        fixed_side: the side of its images in pixels, where it does not take any.
    """

    #: Node of the configuration that describes it.
    NODE = ""
    #: The library's name of the network.
    name = ""

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        stages: Mapping[str, Stage],
        freeze_at: int = 0,
        sides: Sequence[int] = (224,),
    ) -> None:
        """
        Args:
            net: takes images (N, 3, H, W).
            num_classes: outputs of it.
            stages: of the network, by name, finest first; may be empty.
            freeze_at: see `timm_networks.freeze`.
            sides: of the images that it will get, in pixels.

        Raises:
            ConfigError: it does not take such images, or has other outputs than one a class.
        """
        super().__init__()
        self.net = net
        self.num_classes = num_classes
        self.stages = dict(stages)
        for side in dict.fromkeys(sides):  # what cannot be is known before the training, or the evaluation
            self.require_logits(side)
        self.fixed_side = None if self._takes(_ANY_SIDE) else sides[0]
        freeze(net, self.stages, freeze_at, self.fixed_side or _ANY_SIDE)

    def require_logits(self, side: int) -> None:
        """Runs a blank image, `side` pixels wide and high.

        Raises:
            ConfigError: the network does not take it, or has other outputs than one a class.
        """
        try:
            shape = self._logits_shape(side)
        except Exception as error:
            raise ConfigError(
                f"{self.NODE}.NAME {self.name} does not take images of {side} x {side} pixels ({first_line(error)}): "
                f"see INPUT.CLASSIFICATION.SIZE and TEST_SIZE, and {self.NODE}.ARGS."
            ) from error
        if shape != (1, self.num_classes):
            raise ConfigError(
                f"{self.NODE}.NAME {self.name} gives {shape} for an image, and not {(1, self.num_classes)}: see "
                f"{self.NODE}.ARGS."
            )

    @torch.no_grad()
    def _logits_shape(self, side: int) -> tuple[int, ...]:
        """The shape of the logits of a blank image."""
        was_training = self.training
        try:
            blank = torch.zeros(1, image_channels(self.net), side, side, device=next(self.parameters()).device)
            return tuple(self.eval()(blank)["class_logits"].shape)
        finally:
            self.train(was_training)

    def _takes(self, side: int) -> bool:
        with contextlib.suppress(Exception):
            return bool(self._logits_shape(side))
        return False

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> {"class_logits": (N, classes)}."""
        logits = self.net(images)
        return {"class_logits": logits if isinstance(logits, Tensor) else logits[0]}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Returns the only output."""
        return {"class_logits": ShapeSpec(channels=self.num_classes)}

    @property
    def size_divisibility(self) -> int:
        """Images come in the size that the network takes: nothing is padded."""
        return 0

    @property
    def stage_names(self) -> list[str]:
        """The stages of the trunk, finest first."""
        return list(self.stages)

    def stage_shapes(self) -> dict[str, ShapeSpec]:
        """Returns channels and strides of the stages, finest first."""
        return {name: ShapeSpec(channels=s.channels, stride=s.stride) for name, s in self.stages.items()}

    def stage_module(self, stage: str) -> nn.Module | None:
        """Returns the module that ends a stage; None where there is none of that name."""
        return find_module(self.net, self.stages[stage].module) if stage in self.stages else None

    def is_channels_last(self, module: nn.Module) -> bool:
        """Returns whether a module of the network gives (N, H, W, C)."""
        return gives_nhwc(self.net) and not isinstance(module, nn.Conv2d)

    @abstractmethod
    def load_pretrained(self, weights: str | Mapping[str, Tensor]) -> list[str]:
        """Loads pretrained weights, a file, `DOWNLOAD`, or what was read already.

        Returns:
            The names of parameters that they do not fill.

        Raises:
            ConfigError: they cannot be loaded.
        """


class TimmNetwork(WholeNetwork):
    """A whole classifier of timm."""

    NODE = "MODEL.TIMM"

    def __init__(
        self,
        name: str,
        num_classes: int,
        *,
        arguments: Mapping[str, Any] | None = None,
        strides: Sequence[Any] = (),
        norm: str = "BN",
        freeze_at: int = 0,
        sides: Sequence[int] = (224,),
    ) -> None:
        """
        Args:
            name: of the network, as timm.create_model takes it.
            num_classes: of its classifier.
            arguments: further ones of timm.create_model.
            strides: of convolutions to change, [path, stride, ...].
            norm: see `timm_networks.NORMS`.
            freeze_at: see `timm_networks.freeze`.
            sides: of the images, in pixels; networks of a fixed size are built for the first.

        Raises:
            ConfigError: there is no such network or argument, or it does not take such images.
        """
        self.name = name
        self.arguments: dict[str, Any] = {"num_classes": num_classes, **(arguments or {})}
        if _has_fixed_size(name) and "img_size" not in self.arguments:
            self.arguments["img_size"] = sides[0]
        net = create(name, **self.arguments)
        change_strides(net, strides)
        super().__init__(set_norms(net, norm), num_classes, network_stages(net), freeze_at, sides)

    def layers_to_the_end(self) -> dict[str, int]:
        """Returns how many layers lie between each parameter and the classifier, for `SOLVER.LAYER_DECAY`."""
        names = [name for name, _ in self.net.named_parameters()]
        return {f"net.{n}": i for n, i in layers_to_the_end(self.name, self.arguments, names).items()}

    def load_pretrained(self, weights: str | Mapping[str, Tensor]) -> list[str]:
        """As in the base class, from `MODEL.TIMM.WEIGHTS`."""
        pretrained = read_pretrained(create, self.name, weights, self.arguments)
        for key, tensor in self.net.state_dict().items():
            if key not in pretrained.left:
                tensor.copy_(pretrained.state[key])
        return pretrained.left


def _has_fixed_size(name: str) -> bool:
    """Whether a network of timm is built for one size of images, as most transformers are."""
    with torch.device("meta"):
        return hasattr(getattr(create(name), "patch_embed", None), "img_size")


def build_timm_network(cfg: CfgNode, input_shape: ShapeSpec) -> TimmNetwork:
    """The whole classifier of MODEL.TIMM, for `MODEL.CLASSIFIER.NUM_CLASSES` classes.

    Raises:
        ConfigError: MODEL.TIMM does not describe a network of timm.
    """
    node = cfg.MODEL.TIMM
    log_pixels(cfg)
    return TimmNetwork(
        node.NAME,
        cfg.MODEL.CLASSIFIER.NUM_CLASSES,
        arguments=arguments_of(node),
        strides=node.STRIDES,
        norm=node.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        sides=sides_of(cfg),
    )


def sides_of(cfg: CfgNode) -> list[int]:
    """Returns the sides of the images that a classifier gets, in training and in evaluation, in pixels."""
    node = cfg.INPUT.CLASSIFICATION
    return [node.SIZE, node.TEST_SIZE or node.SIZE]


@config_check
def check_whole_networks(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: something else than an ImageClassifier has a whole network.
    """
    name = cfg.MODEL.BACKBONE.NAME
    if name in ("build_timm_network", "build_torchvision_network") and cfg.MODEL.META_ARCHITECTURE != "ImageClassifier":
        raise ConfigError(
            f"MODEL.BACKBONE.NAME {name} is a whole classifier, for MODEL.META_ARCHITECTURE ImageClassifier; a "
            f"{cfg.MODEL.META_ARCHITECTURE} needs feature maps, e.g. of build_timm_fpn_backbone."
        )


if "build_timm_network" not in BACKBONE_REGISTRY:
    BACKBONE_REGISTRY.register(build_timm_network)
