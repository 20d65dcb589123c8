"""BACKBONE "build_torchvision_network": whole classifiers of torchvision."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer

from d2kd.config import config_check, declare_keys
from d2kd.errors import ConfigError, did_you_mean
from d2kd.settings import NOT_EMPTY, setting
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY

from ..checkpoint_files import read_checkpoint
from ..pretrained_names import unpacked
from .pixels import log_pixels
from .timm_networks import DOWNLOAD, PAIRS, Stage, first_line, named_arguments
from .whole_networks import WholeNetwork, sides_of

#: Modules that end the stages of torchvision's networks, by class: path, stride.
_TORCHVISION_STAGES: Mapping[str, Sequence[tuple[str, int]]] = {
    "ResNet": (("layer1", 4), ("layer2", 8), ("layer3", 16), ("layer4", 32)),
    "ShuffleNetV2": (("maxpool", 4), ("stage2", 8), ("stage3", 16), ("stage4", 32)),
    "MobileNetV2": (("features.3", 4), ("features.6", 8), ("features.13", 16), ("features.17", 32)),
}

#: Arguments of torchvision.models.get_model that other keys decide.
_TAKEN = {"weights": "MODEL.TORCHVISION.WEIGHTS", "num_classes": "MODEL.CLASSIFIER.NUM_CLASSES"}

declare_keys(  # BACKBONE.NAME "build_torchvision_network"
    "MODEL.TORCHVISION",
    NAME=setting("resnet50", "Classifier, as torchvision.models.get_model takes it.", rule=NOT_EMPTY),
    WEIGHTS=setting(
        "",
        'Pretrained weights that a training starts from: a file, "download" for torchvision\'s default, "" for none. '
        "Weights of MODEL.WEIGHTS go on top of them.",
        path=True,
    ),
    ARGS=setting(
        [], 'Further arguments of torchvision.models.get_model: ["name", value, ...].', items=object, rule=PAIRS
    ),
)


#: They bring images normalized as for torchvision's other networks to what TensorFlow's weights of theirs expect.
#: torchvision does that where it loads these weights itself; here they may come later.
_TRANSFORMS_INPUT = ("googlenet", "inception_v3")


class TorchvisionNetwork(WholeNetwork):
    """A whole classifier of torchvision."""

    NODE = "MODEL.TORCHVISION"

    def __init__(
        self,
        name: str,
        num_classes: int,
        *,
        arguments: Mapping[str, Any] | None = None,
        freeze_at: int = 0,
        sides: Sequence[int] = (224,),
    ) -> None:
        """
        Args:
            name: of the network, as torchvision.models.get_model takes it.
            num_classes: of its classifier.
            arguments: further ones of get_model.
            freeze_at: see `timm_networks.freeze`.
            sides: of the images, in pixels.

        Raises:
            ConfigError: there is no such network or argument, or it does not take such images.
        """
        from torchvision import models

        check_torchvision_name(name)
        self.name = name
        own = {"transform_input": True} if name in _TRANSFORMS_INPUT else {}
        try:
            net = models.get_model(name, weights=None, num_classes=num_classes, **{**own, **(arguments or {})})
        except Exception as error:
            raise ConfigError(
                f"MODEL.TORCHVISION.NAME {name} cannot be built so: {first_line(error)}. Check its ARGS."
            ) from error
        _drop_auxiliary_heads(net)
        super().__init__(net, num_classes, _torchvision_stages(net), freeze_at, sides)

    def is_channels_last(self, module: nn.Module) -> bool:
        """As in the base class: torchvision's Swin transformers permute the image first, and the map after the last."""
        return isinstance(self.net, SwinTransformer) and not isinstance(
            module, nn.Conv2d | nn.AdaptiveAvgPool2d | type(self.net.permute)
        )

    def load_pretrained(self, weights: str | Mapping[str, Tensor]) -> list[str]:
        """As in the base class, from `MODEL.TORCHVISION.WEIGHTS`."""
        state = _torchvision_weights(self.name, weights) if isinstance(weights, str) else weights
        ours = self.net.state_dict()
        fitting = {k: v for k, v in state.items() if k in ours and v.shape == ours[k].shape}
        left = [key for key in ours if key not in fitting and not key.endswith("num_batches_tracked")]
        if len(left) > len(ours) // 2 or any(self._is_trunk(key) for key in left):
            what = f"MODEL.TORCHVISION.WEIGHTS is {weights!r}, which" if isinstance(weights, str) else "it"
            raise ConfigError(
                f"{what} does not fit {self.name} of torchvision: {left[0]} and {len(left) - 1} more are not there, "
                "or of another shape."
            )
        self.net.load_state_dict(fitting, strict=False)
        return left

    def _is_trunk(self, key: str) -> bool:
        heads = ("fc.", "classifier.", "head.", "heads.", "AuxLogits.", "aux1.", "aux2.")
        return not key.startswith(heads)


def _drop_auxiliary_heads(net: Any) -> None:
    """No loss trains the auxiliary classifiers of GoogLeNet and Inception; torchvision leaves them out in this way."""
    for name in ("aux1", "aux2", "AuxLogits"):
        if getattr(net, name, None) is not None:
            net.aux_logits = False
            setattr(net, name, None)


def _torchvision_stages(net: nn.Module) -> dict[str, Stage]:
    listed = _TORCHVISION_STAGES.get(type(net).__name__, ())
    if not listed:
        return {}
    channels: dict[str, int] = {}

    def note(path: str) -> Any:
        return lambda module, args, output: channels.__setitem__(path, output.shape[1])

    handles = [net.get_submodule(path).register_forward_hook(note(path)) for path, _ in listed]
    was_training = net.training
    with torch.no_grad():
        net.eval()(torch.zeros(1, 3, 64, 64))
    net.train(was_training)
    for handle in handles:
        handle.remove()
    return {f"res{i}": Stage(i - 2, p, channels[p], stride) for i, (p, stride) in enumerate(listed, start=2)}


def _torchvision_weights(name: str, weights: str) -> Mapping[str, Tensor]:
    try:
        if weights == DOWNLOAD:
            from torchvision import models

            return models.get_model_weights(name).DEFAULT.get_state_dict(progress=True, check_hash=True)
        return unpacked(read_checkpoint(weights))
    except Exception as error:
        raise ConfigError(
            f"MODEL.TORCHVISION.WEIGHTS is {weights!r}, which cannot be read: {first_line(error)}. Give the path of a "
            f"file, {DOWNLOAD!r}, or '' for none."
        ) from error


def check_torchvision_name(name: str) -> None:
    """
    Raises:
        ConfigError: torchvision has no classifier of this name.
    """
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        raise ConfigError(
            f"MODEL.TORCHVISION.NAME is {name!r}; torchvision has no such classifier.{did_you_mean(name, names)}"
        )


def build_torchvision_network(cfg: CfgNode, input_shape: ShapeSpec) -> TorchvisionNetwork:
    """The whole classifier of MODEL.TORCHVISION, for `MODEL.CLASSIFIER.NUM_CLASSES` classes.

    Raises:
        ConfigError: MODEL.TORCHVISION does not describe a network of torchvision.
    """
    node = cfg.MODEL.TORCHVISION
    log_pixels(cfg)
    return TorchvisionNetwork(
        node.NAME,
        cfg.MODEL.CLASSIFIER.NUM_CLASSES,
        arguments=named_arguments("MODEL.TORCHVISION.ARGS", node.ARGS, _TAKEN),
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        sides=sides_of(cfg),
    )


@config_check
def check_torchvision(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: the network is not there, or ARGS has what other keys decide.
    """
    if cfg.MODEL.BACKBONE.NAME == "build_torchvision_network":
        check_torchvision_name(cfg.MODEL.TORCHVISION.NAME)
        named_arguments("MODEL.TORCHVISION.ARGS", cfg.MODEL.TORCHVISION.ARGS, _TAKEN)


if "build_torchvision_network" not in BACKBONE_REGISTRY:
    BACKBONE_REGISTRY.register(build_torchvision_network)
