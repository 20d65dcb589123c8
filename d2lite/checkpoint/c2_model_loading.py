"""Fits checkpoints with other parameter names to a model: Caffe2's names, and names that lack a prefix."""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

logger = logging.getLogger(__name__)


def align_and_update_state_dicts(
    model_state_dict: Mapping[str, torch.Tensor],
    ckpt_state_dict: Mapping[str, torch.Tensor],
    c2_conversion: bool = True,
) -> dict[str, torch.Tensor]:
    """Renames the entries of a checkpoint to the parameters of a model that they stand for.

    A checkpoint's name stands for a model's name if it is equal to it or to its ending after a dot
    ("res2.0.conv1.weight" for "backbone.bottom_up.res2.0.conv1.weight"); of several, the longest one does.

    Args:
        model_state_dict: the model's state dict.
        ckpt_state_dict: the checkpoint's.
        c2_conversion: translate Caffe2's names first.

    Returns:
        A copy of the checkpoint's entries, under the model's names where they fit. Entries that match
        nothing, or whose shape differs, keep the checkpoint's name.

    Raises:
        ValueError: if one entry of the checkpoint stands for several parameters of the model.
    """
    if c2_conversion:
        weights, original_names = convert_c2_detectron_names(ckpt_state_dict)
    else:
        weights, original_names = dict(ckpt_state_dict), {name: name for name in ckpt_state_dict}

    model_name_of = _match_by_suffix(model_state_dict, weights)
    aligned: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        model_name = model_name_of.get(name)
        if model_name is not None and not _has_shape_of(value, model_state_dict[model_name]):
            logger.warning(
                "Skipped '%s' %s of the checkpoint: the model's '%s' has shape %s.",
                original_names[name],
                tuple(value.shape),
                model_name,
                tuple(model_state_dict[model_name].shape),
            )
            model_name = None
        aligned[model_name or original_names[name]] = value.clone()
    logger.info(
        "Matched %d of the checkpoint's %d entries to the model's %d by the ending of their names.",
        sum(name in model_state_dict for name in aligned),
        len(weights),
        len(model_state_dict),
    )
    return aligned


def _match_by_suffix(model_names: Iterable[str], ckpt_names: Mapping[str, Any]) -> dict[str, str]:
    """Maps names of the checkpoint to names of the model."""
    matched: dict[str, str] = {}
    for model_name in model_names:
        parts = model_name.split(".")
        suffixes = (".".join(parts[start:]) for start in range(len(parts)))
        ckpt_name = next((suffix for suffix in suffixes if suffix in ckpt_names), None)
        if ckpt_name is None:
            continue
        if ckpt_name in matched:
            raise ValueError(
                f"Ambiguous checkpoint: its '{ckpt_name}' matches both '{matched[ckpt_name]}' and "
                f"'{model_name}' of the model. Give its entries the model's names, and load it without "
                "matching_heuristics."
            )
        matched[ckpt_name] = model_name
    return matched


def _has_shape_of(value: torch.Tensor, parameter: torch.Tensor) -> bool:
    # A lazy module's parameter has no shape before the first forward pass.
    is_lazy = isinstance(parameter, torch.nn.parameter.UninitializedTensorMixin)
    return is_lazy or value.shape == parameter.shape


def convert_basic_c2_names(original_keys: Iterable[str]) -> list[str]:
    """Translates Caffe2's blob names of a classification network (ResNet, ResNeXt).

    Args:
        original_keys: names such as "res2_0_branch2a_bn_s".

    Returns:
        As many names in the same order, such as "res2.0.conv1.norm.weight".
    """
    return [_substitute(name, _BASIC_RULES) for name in original_keys]


def convert_c2_detectron_names(
    weights: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Translates the blobs of a Detectron (Caffe2) detector: their names and their class order.

    Caffe2 models count the background as class 0; here it is the last class of the box classifier and is
    absent from box regression and masks.

    Args:
        weights: blob name -> tensor.

    Returns:
        New name -> tensor, and new name -> blob name.
    """
    converted: dict[str, torch.Tensor] = {}
    original_names: dict[str, str] = {}
    for blob, basic_name in zip(weights, convert_basic_c2_names(weights)):
        name = _substitute(basic_name, _DETECTOR_RULES)
        converted[name] = _reorder_classes(basic_name, weights[blob])
        original_names[name] = blob
    return converted, original_names


def _reorder_classes(name: str, value: torch.Tensor) -> torch.Tensor:
    layer = name.partition(".")[0]
    if layer == "cls_score":
        return torch.cat([value[1:], value[:1]])
    if layer == "bbox_pred":
        return value[4:]
    if layer == "mask_fcn_logits" and value.shape[0] > 1:
        return value[1:]
    return value


def _substitute(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name)
    return name


def _rules(*rules: tuple[str, str]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), replacement) for pattern, replacement in rules]


_BASIC_RULES = _rules(
    (r"_(bn|gn)_s$", ".norm.weight"),
    (r"_(bn|gn)_b$", ".norm.bias"),
    (r"_bn_(rm|running_mean)$", ".norm.running_mean"),
    (r"_bn_(riv|running_var)$", ".norm.running_var"),
    (r"_w$", ".weight"),
    (r"_b$", ".bias"),
    (r"^(res_)?conv1\.", "stem.conv1."),
    (r"^(res\d)_(\d+)_", r"\1.\2."),
    (r"^(res\d\.\d+)\.branch1\b", r"\1.shortcut"),
    (r"^(res\d\.\d+)\.branch2a", r"\1.conv1"),
    (r"^(res\d\.\d+)\.branch2b", r"\1.conv2"),
    (r"^(res\d\.\d+)\.branch2c", r"\1.conv3"),
    (r"^(pred|fc1000)\.", "linear."),
)

_DETECTOR_RULES = _rules(
    (r"^fpn_inner_res(\d)_\d+_sum(_lateral)?\.", r"fpn_lateral\1."),
    (r"^fpn_res(\d)_\d+_sum\.", r"fpn_output\1."),
    (r"^fpn_(\d)\.", r"top_block.p\1."),
    (r"^conv_rpn(_fpn\d)?\.", "proposal_generator.rpn_head.conv."),
    (r"^rpn_cls_logits(_fpn\d)?\.", "proposal_generator.rpn_head.objectness_logits."),
    (r"^rpn_bbox_pred(_fpn\d)?\.", "proposal_generator.rpn_head.anchor_deltas."),
    # A ReLU stands between the convolutions of the RetinaNet head, so their indices are even.
    (r"^retnet_(cls|bbox)_conv_n0_fpn\d\.", r"head.\1_subnet.0."),
    (r"^retnet_(cls|bbox)_conv_n1_fpn\d\.", r"head.\1_subnet.2."),
    (r"^retnet_(cls|bbox)_conv_n2_fpn\d\.", r"head.\1_subnet.4."),
    (r"^retnet_(cls|bbox)_conv_n3_fpn\d\.", r"head.\1_subnet.6."),
    (r"^retnet_cls_pred_fpn\d\.", "head.cls_score."),
    (r"^retnet_bbox_pred_fpn\d\.", "head.bbox_pred."),
    (r"^fc6\.", "box_head.fc1."),
    (r"^fc7\.", "box_head.fc2."),
    (r"^head_conv(\d)\.", r"box_head.conv\1."),
    (r"^(cls_score|bbox_pred)\.", r"box_predictor.\1."),
    (r"^_\[mask\]_fcn(\d)\.", r"mask_head.mask_fcn\1."),
    (r"^conv5_mask\.", "mask_head.deconv."),
    (r"^mask_fcn_logits\.", "mask_head.predictor."),
)
