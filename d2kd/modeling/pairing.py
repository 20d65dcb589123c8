"""Which features a method compares: taps of both networks, pair by pair, and what is known of their maps."""

import logging
from collections.abc import Sequence

import torch
from torch import nn

from d2kd.distillers import DISTILLERS, NormAffine, TapPair
from d2kd.layers import TapShape
from detectron2.config import CfgNode

from .prediction_taps import check_same_meaning, shared_predictions, what_taps_hold
from .random_state import untouched_random_state
from .roi_outputs import is_region_tap, student_stage
from .taps import FeatureTaps, TapError, is_in_backbone, last_norm, tap_names

logger = logging.getLogger(__name__)

#: Levels with fewer cells across are not distilled unless a recipe names them.
_FEWEST_CELLS = 4
#: Side of the blank image, in pixels, that shows the shapes of tapped features.
_PROBE_SIZE = 128


def pairs_of_methods(
    cfg: CfgNode, methods: Sequence[str], student: nn.Module, teacher: nn.Module
) -> dict[str, list[TapPair]]:
    """The pairs of every method: those that the configuration names, else all that both networks have.

    Raises:
        TapError: a tap is unknown, or nothing is shared and nothing named.
    """
    names = {}
    for method in methods:
        key, what = DISTILLERS.get(method).CONFIG_NODE, DISTILLERS.get(method).PREDICTION
        names[method] = _tap_names_of(
            f"DISTILL.{key}", cfg.DISTILL[key], student, teacher, what, min(cfg.INPUT.MIN_SIZE_TRAIN, default=0)
        )
        if what:
            check_same_meaning(f"DISTILL.{key}", names[method], student, teacher)
        logger.info("%s at %s", method, ", ".join(s if s == t else f"{s} <- {t}" for s, t in names[method]))
    student_shapes = tap_shapes(student, [s for pairs in names.values() for s, _ in pairs])
    teacher_shapes = tap_shapes(teacher, [t for pairs in names.values() for _, t in pairs])
    holds = what_taps_hold(student)
    return {
        method: [
            TapPair(
                s,
                t,
                student_shapes[s],
                teacher_shapes[t],
                holds.get(s, ""),
                _norm_before(teacher, t, teacher_shapes[t]),
            )
            for s, t in pairs
        ]
        for method, pairs in names.items()
    }


def _tap_names_of(
    key: str, node: CfgNode, student: nn.Module, teacher: nn.Module, what: str = "", image_side: int = 0
) -> list[tuple[str, str]]:
    shared: list[tuple[str, str]] = []
    if what and not node.TAPS:
        shared = shared_predictions(student, teacher, what)
    elif not node.TAPS:
        shared = [(name, name) for name in shared_levels(student, teacher, image_side)]
    ours = list(node.TAPS) or [s for s, _ in shared]
    theirs = list(node.TEACHER_TAPS) or (ours if node.TAPS else [t for _, t in shared])
    if what and not ours:
        example = "head.cls_score@0" if what == "logits" else "head.bbox_pred@0"
        raise TapError(
            f"{key}.TAPS is empty, and a {type(student).__name__} and a {type(teacher).__name__} make no {what} at "
            f"the same places that d2kd knows. Name the modules in {key}.TAPS and {key}.TEACHER_TAPS, e.g. "
            f"['{example}'], or take the method out of DISTILL.METHODS."
        )
    if not ours:
        raise TapError(
            f"{key}.TAPS is empty, and the backbones share no output: the student's has "
            f"{', '.join(tap_names(student))}, the teacher's {', '.join(tap_names(teacher))}. Name the features in "
            f"{key}.TAPS and {key}.TEACHER_TAPS."
        )
    if len(ours) != len(theirs):
        raise TapError(
            f"{key}.TAPS names {len(ours)} features and {key}.TEACHER_TAPS {len(theirs)}; they are compared pair by "
            "pair."
        )
    return list(zip(ours, theirs))


def shared_levels(student: nn.Module, teacher: nn.Module, image_side: int = 0) -> list[str]:
    """Outputs that both backbones have, finest first.

    Left out are levels that merely pool the one below (R-CNN's p6), and, for images whose shorter side is `image_side`
    pixels, levels of fewer than four cells across: statistics over so few cells are noise, and imitating them drowns
    the other levels.
    """
    pooled = _pooled_levels(student) | _pooled_levels(teacher)
    ours, theirs = student.backbone.output_shape(), teacher.backbone.output_shape()
    shared = [name for name in ours if name in theirs and name not in pooled]
    small = [name for name in shared if 0 < image_side < _FEWEST_CELLS * (ours[name].stride or 1)]
    if small and len(small) < len(shared):
        logger.info("Too small to distil by default on images of %d pixels: %s", image_side, ", ".join(small))
        return [name for name in shared if name not in small]
    return shared


def _pooled_levels(model: nn.Module) -> set:
    backbone = model.backbone
    top = getattr(backbone, "top_block", None)
    if top is None or any(True for _ in top.parameters()):
        return set()
    return set(list(backbone.output_shape())[-top.num_levels :])


def _norm_before(teacher: nn.Module, tap: str, shape: TapShape) -> NormAffine | None:
    norm = None if is_region_tap(tap) else last_norm(teacher, tap)
    if norm is None or norm.running_var.numel() != shape.channels:
        return None
    weight, bias = norm.weight, norm.bias
    if weight is None:  # a norm without scale and shift
        return NormAffine(torch.ones_like(norm.running_var), torch.zeros_like(norm.running_var))
    return NormAffine(weight.detach(), bias.detach())


def split_teacher_taps(student: nn.Module, pairs: Sequence[TapPair]) -> tuple[list[str], list[tuple[int, str]]]:
    """Taps of the teacher's own pass, and those of its box head with the student's stage that gives the regions."""
    regions = [pair for pair in pairs if is_region_tap(pair.teacher)]
    plain = [pair.teacher for pair in pairs if not is_region_tap(pair.teacher)]
    return plain, list(dict.fromkeys((student_stage(student, pair.student), pair.teacher) for pair in regions))


@torch.no_grad()
def tap_shapes(model: nn.Module, names: Sequence[str]) -> dict[str, TapShape]:
    """Channels and strides of tapped features, seen on a blank image.

    Raises:
        TapError: a tap is unknown, does not fire, fires twice, or is neither a feature map (N, C, H, W) nor a vector
            (R, C) a region or image.
    """
    was_training = model.training
    device = next(model.parameters()).device
    blank = torch.zeros(3, _PROBE_SIZE, _PROBE_SIZE, dtype=torch.uint8, device=device)
    widths: list[int] = []
    handle = model.backbone.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[-1]))
    taps = FeatureTaps(model, names)
    in_backbone = all(is_in_backbone(model, tap.name) for tap in taps.taps)
    model.eval()
    try:
        with untouched_random_state(device), taps.recording(stop_when_done=in_backbone) as features:
            model([{"image": blank, "height": _PROBE_SIZE, "width": _PROBE_SIZE}])
    finally:
        handle.remove()
        model.train(was_training)
    for name, feature in features.items():
        if feature.dim() not in (2, 4):
            raise TapError(
                f"Tap {name!r} has the shape {tuple(feature.shape)}; only feature maps (N, C, H, W) and vectors (R, "
                "C) can be distilled."
            )
    return {n: TapShape(f.shape[1], widths[0] / f.shape[-1] if f.dim() == 4 else 0.0) for n, f in features.items()}
