"""Checkpoints of ResNets, MobileNetV2 and vision transformers of other libraries, under a Detectron2 model's names."""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

from torch import Tensor

RESNET = "torchvision or timm ResNet"
DEEP_STEM_RESNET = "ResNet with a stem of three convolutions"
RESNET_V1C = "mmsegmentation ResNet-v1c"
MOBILENET_V2 = "torchvision MobileNetV2"
TIMM_VIT = "timm ViT"
TORCHVISION_VIT = "torchvision ViT"

# where training programs keep the weights in their files; "teacher" is DINO's average of its student
_CONTAINERS = ("model", "state_dict", "model_state_dict", "teacher")
# wrappers, whose names stand before those of the network
_PREFIXES = r"(?:(?:module|backbone|encoder|model)\.)*"
_VIT_NAMES = (
    r"pos_embed|patch_embed\.proj\.(weight|bias)"
    r"|blocks\.\d+\.(norm1|attn\.qkv|attn\.proj|norm2|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
)


class _Naming(NamedTuple):
    """How a kind of network names its weights, and what Detectron2 calls them in the bottom-up network."""

    # names that every file of this kind has, the first layer's first
    required: tuple[str, str]
    # start of the names of the network itself; others are of heads, which anybody may have added
    own: str
    # patterns and replacements, applied in this order
    renamings: Sequence[tuple[str, str]]
    # Detectron2's names. Where one of `own` becomes none of these, the network has parts that Detectron2's lacks.
    renamed: str


_TENSORS = r"\.(weight|norm\.(weight|bias|running_mean|running_var|num_batches_tracked))"
_RESNET_STAGES = (
    *((rf"^layer{i}\.", f"res{i + 1}.") for i in range(1, 5)),
    (r"\.bn([123])\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"^fc\.", "linear."),
)
_RESNET_NAMES = rf"(stem\.conv[123]|res[2-5]\.\d+\.(conv[123]|shortcut)){_TENSORS}|linear\.(weight|bias)"
#: The blocks of MobileNetV2 from the first one on, as d2kd's backbone has them.
_MOBILE_BLOCKS = [f"res{stage}.{i}" for stage, count in ((2, 3), (3, 3), (4, 7), (5, 4)) for i in range(count)]


def _mobile_renamings() -> list[tuple[str, str]]:
    """Renamings of torchvision's "features.N.conv.M": each but the last convolution lies beside its norm, in a pair."""
    renamings = [(r"^features\.0\.0\.", "stem.conv1."), (r"^features\.0\.1\.", "stem.conv1.norm.")]
    for number, block in enumerate(_MOBILE_BLOCKS, start=1):
        pairs = ["depthwise"] if number == 1 else ["expand", "depthwise"]
        for place, layer in enumerate(pairs):
            renamings.append((rf"^features\.{number}\.conv\.{place}\.0\.", f"{block}.{layer}."))
            renamings.append((rf"^features\.{number}\.conv\.{place}\.1\.", f"{block}.{layer}.norm."))
        renamings.append((rf"^features\.{number}\.conv\.{len(pairs)}\.", f"{block}.project."))
        renamings.append((rf"^features\.{number}\.conv\.{len(pairs) + 1}\.", f"{block}.project.norm."))
    return renamings


_NAMINGS = {
    RESNET: _Naming(
        required=("conv1.weight", "layer1.0.conv1.weight"),
        own=r"(conv|bn|layer)\d+\.",
        renamings=((r"^conv1\.", "stem.conv1."), (r"^bn1\.", "stem.conv1.norm."), *_RESNET_STAGES),
        renamed=_RESNET_NAMES,
    ),
    DEEP_STEM_RESNET: _Naming(
        required=("conv3.weight", "layer1.0.conv1.weight"),
        own=r"(conv|bn|layer)\d+\.|attnpool\.",  # CLIP's ResNets pool where these have strides
        renamings=((r"^conv([123])\.", r"stem.conv\1."), (r"^bn([123])\.", r"stem.conv\1.norm."), *_RESNET_STAGES),
        renamed=_RESNET_NAMES,
    ),
    RESNET_V1C: _Naming(
        required=("stem.0.weight", "layer1.0.conv1.weight"),
        own=r"(stem|layer\d+)\.",
        renamings=(
            *((rf"^stem\.{3 * i}\.", f"stem.conv{i + 1}.") for i in range(3)),
            *((rf"^stem\.{3 * i + 1}\.", f"stem.conv{i + 1}.norm.") for i in range(3)),
            *_RESNET_STAGES,
        ),
        renamed=_RESNET_NAMES,
    ),
    MOBILENET_V2: _Naming(
        required=("features.0.0.weight", "features.1.conv.0.0.weight"),
        own=r"features\.(\d|1[0-7])\.",
        renamings=_mobile_renamings(),
        renamed=rf"(stem\.conv1|res[2-5]\.\d\.(expand|depthwise|project)){_TENSORS}",
    ),
    TIMM_VIT: _Naming(
        required=("patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
        own=r"(patch_embed|norm_pre|blocks)\.",
        renamings=(),
        renamed=_VIT_NAMES,
    ),
    TORCHVISION_VIT: _Naming(
        required=("conv_proj.weight", "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"),
        own=r"conv_proj\.|encoder\.layers\.",
        renamings=(
            (r"^conv_proj\.", "patch_embed.proj."),
            (r"^encoder\.pos_embedding$", "pos_embed"),
            (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
            (r"\.ln_([12])\.", r".norm\1."),
            (r"\.self_attention\.in_proj_", ".attn.qkv."),
            (r"\.self_attention\.out_proj\.", ".attn.proj."),
            (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),  # "linear_1" and "linear_2" in older files
            (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
        ),
        renamed=_VIT_NAMES,
    ),
}


def source_of(weights: Mapping[str, Any]) -> str | None:
    """Returns what kind of network a checkpoint is of, by its names: one of the constants above.

    Args:
        weights: {name: tensor}, or a dict that has it under "model", "state_dict", "model_state_dict" or "teacher". The
            names may have the prefixes "module.", "backbone.", "encoder." and "model.".

    Returns:
        None for all others: Detectron2's own files, and networks that only resemble these, with parts that Detectron2
        lacks, such as timm's deep stems ("resnet50d"), squeeze-and-excitation, and layer scale (DINOv2, DeiT III).
        Differences without weights cannot be seen: activations, or timm's blur pooling ("resnetblur50").
    """
    source, _ = _recognize(unpacked(weights))
    return source


def to_detectron2(weights: Mapping[str, Any], model_names: Collection[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Renames a checkpoint to the parameters and buffers of a model's bottom-up network.

    Args:
        weights: as for `source_of`.
        model_names: the names in the model's `state_dict`, e.g. "backbone.bottom_up.stem.conv1.weight".

    Returns:
        The tensors under the model's names, not copied, whatever their shape; and the names of the file, in its order,
        that have no place in the model: classifier, class token, last norm, stages that the model leaves out. All of
        them where `source_of` is None, or the model has another kind of network. The batch counters of norms that are
        frozen in the model are in neither.
    """
    weights = unpacked(weights)
    source, names = _recognize(weights)
    model_names = set(model_names)
    prefix = _bottom_up_prefix(source, model_names)
    if prefix is None:
        return {}, list(weights)
    placed: dict[str, Tensor] = {}
    left_over = []
    for name, tensor in weights.items():
        ours = names.get(name, "")
        # Detectron2's C4 models have "res5" in their heads
        places = [place for place in (f"{prefix}{ours}", f"roi_heads.{ours}") if place in model_names]
        if places:
            placed[places[0]] = tensor
        elif not ours.endswith(".num_batches_tracked"):
            left_over.append(name)
    return placed, left_over


def input_advice(source: str, cfg: Any) -> str | None:
    """Returns a sentence with the keys of a Detectron2 configuration that do not suit the weights, or None.

    The weights expect images as in their own training: RGB, for convolutional networks of ImageNet's mean and
    deviation, and the stride of bottlenecks in the 3x3 convolution. The means of vision transformers vary (timm's
    "augreg": 127.5), and all of it for ResNets with deep stems.

    Args:
        source: what `source_of` returned.
        cfg: the configuration of the model that gets the weights.
    """
    wanted: dict[str, Any] = {} if source == DEEP_STEM_RESNET else {"INPUT.FORMAT": "RGB"}
    if source in (RESNET, RESNET_V1C, MOBILENET_V2):
        wanted |= {"MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53], "MODEL.PIXEL_STD": [58.395, 57.12, 57.375]}
    if "ResNet" in source and cfg.MODEL.RESNETS.DEPTH >= 50:  # below, blocks have no 1x1 convolution
        wanted["MODEL.RESNETS.STRIDE_IN_1X1"] = False
    changes = describe_changes(cfg, wanted)
    return f"Weights of a {source} need what they were trained with: set {changes}." if changes else None


def describe_changes(cfg: Any, wanted: Mapping[str, Any]) -> str:
    """Returns which keys of a configuration are to be set to what, in words; "" where all are so already."""
    found = {key: reduce(getattr, key.split("."), cfg) for key in wanted}
    changes = [f"{key} to {wanted[key]} (it is {found[key]})" for key in wanted if not _same(found[key], wanted[key])]
    return ", ".join(changes)


def misfit(source: str, weights: Mapping[str, Any], model: Mapping[str, Tensor]) -> str | None:
    """Returns why the weights of a network are not those of a model's bottom-up network, or None where they are.

    They may have stages that the model leaves out, and the model may have parts that no such network has (offsets of
    deformable convolutions, relative positions); heads, and tables of positions, may have other sizes.

    Args:
        source: what `source_of` returned.
        weights: as for `source_of`.
        model: its `state_dict`.
    """
    weights = unpacked(weights)
    _, names = _recognize(weights)
    prefix = _bottom_up_prefix(source, model)
    assert prefix is not None, "there is nothing to compare with"
    theirs = {new: weights[old] for old, new in names.items()}
    ours: dict[str, Tensor] = {}
    for name, tensor in model.items():
        short = name.removeprefix(prefix if name.startswith(prefix) else "roi_heads.")
        if re.fullmatch(_NAMINGS[source].renamed, short):
            ours[short] = tensor
    for name, tensor in ours.items():
        if name.endswith(".num_batches_tracked") or re.match(r"linear\.|pos_embed", name):
            continue
        if name not in theirs:
            return f"the model has {name}, and the file nothing like it"
        if tuple(theirs[name].shape) != tuple(tensor.shape):
            return f"{name} is {tuple(tensor.shape)} in the model, and {tuple(theirs[name].shape)} in the file"
    stages = {name.partition(".")[0] for name in ours}
    for name in theirs:
        if name.endswith((".running_mean", ".running_var", ".num_batches_tracked")):
            continue  # norms may be others in the model
        if name not in ours and name.partition(".")[0] in stages - {"linear", "pos_embed"}:
            return f"the file has {name}, and the model nothing like it"
    return None


def is_detector_of_torchvision(weights: Mapping[str, Any]) -> bool:
    """Returns whether weights, by name, are those of a whole detector of torchvision's, with neck and heads."""
    starts = ("backbone.body.", "head.classification_head.", "rpn.head.")
    return any(name.startswith(starts) for name in unpacked(weights))


def unpacked(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the innermost {name: tensor} of a file's content."""
    for key in _CONTAINERS:
        if isinstance(checkpoint.get(key), Mapping):
            return unpacked(checkpoint[key])
    return checkpoint


def _recognize(names: Iterable[str]) -> tuple[str | None, dict[str, str]]:
    """Returns the kind of network, and {name in the file: Detectron2's name in the bottom-up network}."""
    names = list(names)
    for source, naming in _NAMINGS.items():
        first = re.compile(f"({_PREFIXES}){re.escape(naming.required[0])}")
        for prefix in [match[1] for match in map(first.fullmatch, names) if match]:
            stripped = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
            renamed = {name: _rename(short, naming) for name, short in stripped.items()}
            unknown = [name for name, new in renamed.items() if not new and re.match(naming.own, stripped[name])]
            if set(naming.required) <= set(stripped.values()) and not unknown:
                return source, {name: new for name, new in renamed.items() if new}
    return None, {}


def _rename(name: str, naming: _Naming) -> str:
    """Returns Detectron2's name in the bottom-up network, or "" where it has no such part."""
    for pattern, replacement in naming.renamings:
        name = re.sub(pattern, replacement, name)
    return name if re.fullmatch(naming.renamed, name) else ""


def _bottom_up_prefix(source: str | None, model_names: Collection[str]) -> str | None:
    """Returns what stands before the model's names, e.g. "backbone.bottom_up."; None for another network."""
    if source is None:
        return None
    first, second = (_rename(name, _NAMINGS[source]) for name in _NAMINGS[source].required)
    prefixes = [name.removesuffix(first) for name in model_names if f".{name}".endswith(f".{first}")]
    return min((prefix for prefix in prefixes if f"{prefix}{second}" in model_names), key=len, default=None)


def _same(value: Any, wanted: Any) -> bool:
    """Whether two values of a key are equal; pixel values, but for rounding."""
    if not isinstance(wanted, list):
        return bool(value == wanted)
    return len(value) == len(wanted) and all(math.isclose(a, b, abs_tol=0.1) for a, b in zip(value, wanted))
