"""Networks of timm by name: built, described, loaded and frozen; what `MODEL.TIMM` says of them."""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from d2kd.config import declare_keys
from d2kd.errors import ConfigError, did_you_mean
from d2kd.settings import NOT_EMPTY, Rule, setting
from detectron2.config import CfgNode

logger = logging.getLogger(__name__)

#: BACKBONE.NAME of what `MODEL.TIMM` describes.
TIMM_BACKBONES = (
    "build_timm_backbone",
    "build_timm_fpn_backbone",
    "build_retinanet_timm_fpn_backbone",
    "build_fcos_timm_fpn_backbone",
    "build_timm_network",
)
NORMS = ("BN", "FrozenBN", "SyncBN")
#: WEIGHTS that lets timm download its own.
DOWNLOAD = "download"
#: Arguments of timm.create_model that other keys decide.
_TAKEN = {
    "pretrained": "MODEL.TIMM.WEIGHTS",
    "checkpoint_path": "MODEL.TIMM.WEIGHTS",
    "pretrained_cfg_overlay": "MODEL.TIMM.WEIGHTS",
    "num_classes": "MODEL.CLASSIFIER.NUM_CLASSES",
    "in_chans": "MODEL.PIXEL_MEAN",
    "features_only": "MODEL.BACKBONE.NAME",
    "out_indices": "MODEL.TIMM.OUT_FEATURES",
}
#: Arguments that let a network take images of any size, by the families that have them.
_ANY_SIZE: Sequence[dict[str, Any]] = (
    {"dynamic_img_size": True, "dynamic_img_pad": True},
    {"dynamic_img_size": True},
    {"strict_img_size": False},
)

PAIRS = Rule(
    "must be pairs, a name and its value",
    lambda values: len(values) % 2 == 0 and all(isinstance(name, str) for name in values[::2]),
)

declare_keys(  # BACKBONE.NAME "build_timm_backbone", "build_timm_fpn_backbone", ..., "build_timm_network"
    "MODEL.TIMM",
    NAME=setting("resnet50", "Network, as timm.create_model takes it, e.g. mobilenetv3_large_100.", rule=NOT_EMPTY),
    WEIGHTS=setting(
        "",
        'Pretrained weights that a training starts from: a file of timm\'s (.safetensors, .pth), "download" for '
        'timm\'s own, "" for none. Weights of MODEL.WEIGHTS go on top of them.',
        path=True,
    ),
    OUT_FEATURES=setting(
        ["res2", "res3", "res4", "res5"],
        "Outputs of a backbone: the stages by their stride, res2 (4), res3 (8), ...; last_feat of a network with one "
        "stride, such as a plain vision transformer.",
        rule=NOT_EMPTY,
    ),
    NORM=setting(
        "BN",
        "Batch norms: BN trains them | FrozenBN | SyncBN shares them among processes (CUDA). Others stay as they are.",
        choices=NORMS,
    ),
    DROP_PATH_RATE=setting(
        -1.0, "Stochastic depth of the last block; -1 leaves it to the network.", at_least=-1, below=1
    ),
    DROP_RATE=setting(-1.0, "Dropout before the classifier; -1 leaves it to the network.", at_least=-1, below=1),
    ARGS=setting([], 'Further arguments of timm.create_model: ["name", value, ...].', items=object, rule=PAIRS),
    STRIDES=setting([], 'Strides of convolutions to change: ["blocks.3.0.conv_dw", 1, ...].', items=object, rule=PAIRS),
    DATA_CONFIG=setting(
        True,
        "Take PIXEL_MEAN, PIXEL_STD and INPUT.FORMAT from timm's data configuration of the network; False keeps "
        "those that are configured.",
    ),
)


class Stage(NamedTuple):
    """A feature that a network gives: its place in timm's list, the module that ends it, channels and stride."""

    place: int
    module: str
    channels: int
    stride: int


def create(name: str, **arguments: Any) -> nn.Module:
    """Returns timm's network of a name, without weights unless the arguments ask for them.

    Raises:
        ConfigError: there is no such network, or it does not take an argument.
    """
    import timm

    check_name(name)
    try:
        return timm.create_model(name, **arguments)
    except Exception as error:  # constructors of hundreds of networks raise all kinds of them
        raise ConfigError(
            f"MODEL.TIMM.NAME {name} cannot be built so: {first_line(error)}. Check MODEL.TIMM."
        ) from error


def create_features(name: str, **arguments: Any) -> nn.Module:
    """As `create`, of a network that gives a list of its features; for images of any size, where it has that.

    Raises:
        ConfigError: as `create`; or the network gives no features.
    """
    import timm

    check_name(name)
    for extra in (*_ANY_SIZE, {}):
        try:
            return timm.create_model(name, features_only=True, **{**extra, **arguments})
        except Exception as error:
            if isinstance(error, TypeError) and any(f"'{key}'" in str(error) for key in extra):
                continue
            raise ConfigError(
                f"MODEL.TIMM.NAME {name} cannot be built as a backbone (timm's features_only): {first_line(error)}. "
                "Check MODEL.TIMM, or take another network; a whole classifier (MODEL.BACKBONE.NAME "
                "build_timm_network) can be any."
            ) from error
    raise AssertionError("the last attempt returns or raises")


def check_name(name: str) -> None:
    """
    Raises:
        ConfigError: timm has no network of this name, or none with these pretrained weights (the part after a dot).
    """
    import timm

    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) or timm.is_model(name):
        base, dot, tag = name.partition(".")
        if dot and "-" not in base and ":" not in base and name not in timm.list_pretrained(f"{base}.*"):
            raise ConfigError(
                f"MODEL.TIMM.NAME is {name!r}: timm {timm.__version__} has no weights {tag!r} of {base}."
                f"{did_you_mean(name, timm.list_pretrained(f'{base}.*'))}"
            )
        return
    raise ConfigError(
        f"MODEL.TIMM.NAME is {name!r}; timm {timm.__version__} has no such network."
        f"{did_you_mean(name, timm.list_models())}"
    )


@cache
def pretrained_config(name: str) -> Mapping[str, Any]:
    """Returns what timm notes of the pretrained weights of a network: "mean", "std", "num_classes", "classifier", ...

    Raises:
        ConfigError: there is no such network.
    """
    import timm

    check_name(name)
    known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if known is not None:
        return known.to_dict()
    with torch.device("meta"):  # an old name, or a network of a hub, tells it where it is built
        return dict(getattr(create(name), "pretrained_cfg", {}))


def download_url(known: Mapping[str, Any]) -> str:
    """Returns where the pretrained weights of a network are, by its `pretrained_config`; "" where there are none."""
    if known.get("hf_hub_id"):
        file = known.get("hf_hub_filename") or "model.safetensors"
        return f"https://huggingface.co/{known['hf_hub_id']}/resolve/main/{file}"
    return str(known.get("url") or "")


def _strides_of(network: nn.Module, name: str) -> list[int] | None:
    """The strides that a network of features has on images of another size than its own; None where nothing tells."""
    nhwc = gives_nhwc(network)
    try:
        channels = image_channels(network)
        network(torch.zeros(1, channels, 256, 320))
        # a side that the patches of all networks divide, 14 pixels and powers of 2
        return [round(448 / maps.shape[1 if nhwc else 2]) for maps in network(torch.zeros(1, channels, 448, 448))]
    except Exception as error:
        own = getattr(network, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
        try:
            network(torch.zeros(1, *own))
        except Exception:  # it cannot be looked at in this way
            return None
        raise ConfigError(
            f"MODEL.TIMM.NAME {name} takes images of {own[1]} x {own[2]} pixels only ({first_line(error)}): take "
            "another network as a backbone, or see MODEL.TIMM.ARGS."
        ) from error


def image_channels(network: nn.Module) -> int:
    """Returns the channels of the images that a network takes: those of its first convolution.

    3 where that takes more than images have, as it gets the pixels of several cells.
    """
    first = next((module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d)), 3)
    return first if first <= 4 else 3


def gives_nhwc(network: nn.Module) -> bool:
    """Returns whether timm says that the maps of a network are (N, H, W, C)."""
    return str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC")


def _named(stages: Sequence[Stage]) -> dict[str, Stage]:
    """Stages by name: by the stride of the first, and their order (a dilated res5 has the stride of res4)."""
    strides = [stage.stride for stage in stages]
    if len(stages) > 1 and strides[0] == strides[-1]:
        return {"last_feat": stages[-1]}
    first = round(math.log2(strides[0]))
    return {f"res{first + i}": stage for i, stage in enumerate(stages)}


def feature_stages(name: str, arguments: Mapping[str, Any], strides: Sequence[Any] = ()) -> Mapping[str, Stage]:
    """Returns all features that a network can give as a backbone, finest first.

    Args:
        name: of the network.
        arguments: of `create_features`.
        strides: see `change_strides`.

    Raises:
        ConfigError: see `create_features`; or it takes images of one size only.
    """
    with torch.device("meta"):  # nothing is initialized, no random number drawn, and nothing computed
        network = create_features(name, **arguments)
        change_strides(network, strides)
        measured = _strides_of(network, name)
    info: Any = network.feature_info
    stages = [Stage(f["index"], f["module"], f["num_chs"], f["reduction"]) for f in info.get_dicts()]  # of the outputs
    return _named(
        [s._replace(stride=stride) for s, stride in zip(stages, measured or [s.stride for s in stages], strict=True)]
    )


def network_stages(network: nn.Module) -> dict[str, Stage]:
    """Returns the stages that timm lists of a whole network, finest first; {} where it lists none, or one stride."""
    info: Any = getattr(network, "feature_info", None) or []
    stages = [Stage(i, f["module"], f["num_chs"], f["reduction"]) for i, f in enumerate(info)]
    stages = [stage for stage in stages if find_module(network, stage.module) is not None]
    if not stages or stages[0].stride == stages[-1].stride:
        return {}
    return _named(stages)


def find_module(network: nn.Module, name: str) -> nn.Module | None:
    """Returns the module that timm lists under a name, also where a wrapper has renamed it ("stages.0", "stages_0")."""
    modules = dict(network.named_modules())
    for path in (name, name.replace(".", "_", 1), f"model.{name}", f"body.{name}"):
        if path and path in modules:  # timm lists "" where no module ends a stage
            return modules[path]
    return None


def named_arguments(key: str, pairs: Sequence[Any], taken: Mapping[str, str]) -> dict[str, Any]:
    """Returns the arguments of a constructor that a key lists, [name, value, ...].

    Args:
        key: the whole key.
        pairs: its value.
        taken: names that it must not have, and the keys that decide these.

    Raises:
        ConfigError: it has one of them.
    """
    for name in pairs[::2]:
        if name in taken:
            raise ConfigError(f"{key} has {name!r}, which is for {taken[name]} to say: take it out of {key}.")
    return dict(zip(pairs[::2], pairs[1::2]))


def arguments_of(node: CfgNode) -> dict[str, Any]:
    """Returns the arguments of timm.create_model that a node like MODEL.TIMM names.

    Raises:
        ConfigError: among them is one that another key decides.
    """
    arguments = named_arguments("MODEL.TIMM.ARGS", node.ARGS, _TAKEN)
    if node.DROP_PATH_RATE >= 0:
        arguments["drop_path_rate"] = node.DROP_PATH_RATE
    if node.DROP_RATE >= 0:
        arguments["drop_rate"] = node.DROP_RATE
    return arguments


def change_strides(network: nn.Module, pairs: Sequence[Any]) -> None:
    """Changes strides of convolutions, by path, as `MODEL.TIMM.STRIDES` lists them.

    Raises:
        ConfigError: there is no such convolution, or a stride is no positive number.
    """
    modules = dict(network.named_modules())
    for path, stride in zip(pairs[::2], pairs[1::2]):
        module = modules.get(path)
        if not isinstance(module, nn.Conv2d):
            names = [name for name, part in modules.items() if isinstance(part, nn.Conv2d)]
            raise ConfigError(f"MODEL.TIMM.STRIDES names {path!r}, which is no convolution.{did_you_mean(path, names)}")
        if type(stride) is not int or stride < 1:
            raise ConfigError(f"MODEL.TIMM.STRIDES, {path}: {stride!r} is no stride; give a whole number from 1 on.")
        module.stride = (stride, stride)


def set_norms(network: nn.Module, norm: str) -> nn.Module:
    """Returns a network with its batch norms trained ("BN"), frozen or shared; see `NORMS`."""
    if norm == "FrozenBN":
        from timm.utils.model import freeze_batch_norm_2d

        return freeze_batch_norm_2d(network)
    if norm == "SyncBN":
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(network)
    return network


def freeze(network: nn.Module, stages: Mapping[str, Stage], freeze_at: int, side: int = 64) -> list[str]:
    """Freezes what `MODEL.BACKBONE.FREEZE_AT` says: 1 what comes before res2, 2 that and res2, and so on.

    Batch norms among it become frozen ones. What a stage needs is found by its gradients on a blank image.

    Args:
        network: takes images (N, 3, H, W).
        stages: of the network, by name.
        freeze_at: 0 freezes nothing.
        side: of the blank image, in pixels.

    Returns:
        The names of the frozen parameters.
    """
    from timm.utils.model import freeze_batch_norm_2d

    frozen = _parameters_up_to(network, stages, freeze_at, side)
    for name, parameter in network.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    for path, module in list(network.named_modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{path}.weight" in frozen:
            parent, _, child = path.rpartition(".")
            setattr(network.get_submodule(parent), child, freeze_batch_norm_2d(module))
    return sorted(frozen)


def _parameters_up_to(network: nn.Module, stages: Mapping[str, Stage], freeze_at: int, side: int) -> set[str]:
    inner = {name: int(name[3:]) for name in stages if name.startswith("res")}
    wanted = [name for name, number in inner.items() if number <= freeze_at]
    if not freeze_at:
        return set()
    if not inner:
        logger.warning("MODEL.BACKBONE.FREEZE_AT %d has no effect: this network has no stages of their own.", freeze_at)
        return set()
    last = wanted[-1] if wanted else min(inner, key=lambda name: inner[name])
    end = find_module(network, stages[last].module)
    if end is None:
        raise ConfigError(
            f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}, and this network has no module that ends {last}: set it to 0."
        )
    kept: list[Any] = []
    handle = end.register_forward_hook(lambda module, args, output: kept.append(output))
    was_training = network.training
    names, parameters = zip(*network.named_parameters())
    with handle, torch.enable_grad():
        network.eval()(torch.zeros(1, image_channels(network), side, side, device=parameters[0].device))
        network.train(was_training)
        if not isinstance(kept[0], torch.Tensor):
            raise ConfigError(
                f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}, and {last} of this network is a {type(kept[0]).__name__}, "
                "not one map: set it to 0."
            )
        gradients = torch.autograd.grad(kept[0].float().sum(), parameters, allow_unused=True)
    found = {name for name, gradient in zip(names, gradients) if gradient is not None}
    if wanted:
        return found
    own = {id(parameter) for parameter in end.parameters()}  # of res2, which a network without res1 begins with
    return {name for name, parameter in zip(names, parameters) if name in found and id(parameter) not in own}


def layers_to_the_end(name: str, arguments: Mapping[str, Any], names: Sequence[str]) -> dict[str, int]:
    """Returns how many layers lie between each parameter of a network and its last one, by timm's grouping of layers.

    Args:
        name: of the network.
        arguments: of `create`.
        names: of the parameters, as a whole network or a backbone calls them; unknown ones are left out.
    """
    from timm.models import group_parameters

    with torch.device("meta"):
        network: Any = create(name, **arguments)
    layers = {n: i for i, group in group_parameters(network, network.group_matcher(False)).items() for n in group}
    found = {}
    for ours in names:
        theirs = (ours, ours.removeprefix("model."), ours.replace("_", ".", 1))
        layer = next((layers[n] for n in theirs if n in layers), None)
        if layer is not None:
            found[ours] = layer
    last = max(found.values(), default=0)
    return {ours: last - layer for ours, layer in found.items()}


def first_line(error: Exception) -> str:
    """Returns what an error of another library says, in one line without a period."""
    line = f"{error}".strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {line}" if line and isinstance(error, KeyError) else line or type(error).__name__
