"""Which features a method compares: taps of both networks, pair by pair."""

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from d2kd.distillers import DISTILLERS, TapPair
from detectron2.config import CfgNode

from ..architectures import architecture_class, architecture_of, output_shapes
from .address import TapError, tap_names
from .head_rests import head_features
from .shapes import describe_taps

logger = logging.getLogger(__name__)

#: Levels with fewer cells across are not distilled unless a recipe names them.
MIN_LEVEL_SIZE = 4


def pairs_of_methods(
    cfg: CfgNode, methods: Sequence[str], student: nn.Module, teacher: nn.Module
) -> dict[str, list[TapPair]]:
    """Returns the pairs of every method: those that the configuration names, else all that both networks have.

    Raises:
        TapError: a tap is unknown, or nothing is shared and nothing named.
    """
    names = {method: _names_of(cfg, method, student, teacher) for method in methods}
    ours = describe_taps(student, [s for pairs in names.values() for s, _ in pairs])
    theirs = describe_taps(teacher, [t for pairs in names.values() for _, t in pairs])
    return {method: [TapPair(ours[s], theirs[t]) for s, t in pairs] for method, pairs in names.items()}


def _names_of(cfg: CfgNode, method: str, student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
    """The taps of student and teacher that a method compares."""
    kinds, key = DISTILLERS.get(method).predictions() or ("",), f"DISTILL.{DISTILLERS.get(method).NODE}"
    node = cfg.DISTILL[DISTILLERS.get(method).NODE]
    if DISTILLERS.get(method).CONTINUES_HEAD:
        return head_features(cfg, method, student, teacher)
    if node.TAPS:
        ours, theirs = list(node.TAPS), list(node.TEACHER_TAPS or node.TAPS)
    else:
        of_kinds = [_shared(cfg, kind, student, teacher) for kind in kinds]
        shared = [pair for of_kind in of_kinds for pair in of_kind] if all(of_kinds) else []
        ours, theirs = [s for s, _ in shared], list(node.TEACHER_TAPS) or [t for _, t in shared]
    if not ours:
        lacking = next((kind for kind, found in zip(kinds, of_kinds) if not found), kinds[0])
        raise TapError(_nothing_shared(key, lacking, student, teacher))
    if len(ours) != len(theirs):
        raise TapError(
            f"{key}.TAPS names {len(ours)} features and {key}.TEACHER_TAPS {len(theirs)}; they are compared pair by "
            "pair."
        )
    return list(zip(ours, theirs))


def _shared(cfg: CfgNode, kind: str, student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
    side = image_side(cfg)
    if kind:
        return shared_predictions(student, teacher, kind, side)
    return [(name, name) for name in shared_levels(student, teacher, side)]


def image_side(cfg: CfgNode) -> int:
    """Returns the shorter side of the smallest training images, in pixels; 0 where it is not known."""
    classifies = architecture_class(cfg).CLASSIFIES_IMAGES
    return int(cfg.INPUT.CLASSIFICATION.SIZE if classifies else min(cfg.INPUT.MIN_SIZE_TRAIN, default=0))


def _nothing_shared(key: str, kind: str, student: nn.Module, teacher: nn.Module) -> str:
    if kind:
        example = "head.cls_score@0" if kind == "class_logits" else "head.bbox_pred@0"
        return (
            f"{key}.TAPS is empty, and a {type(student).__name__} and a {type(teacher).__name__} make no {kind} at the "
            f"same places that d2kd knows. Name the modules in {key}.TAPS and {key}.TEACHER_TAPS, e.g. ['{example}'], "
            "or take the method out of DISTILL.METHODS."
        )
    return (
        f"{key}.TAPS is empty, and {no_shared_output(student, teacher)} Name the features in {key}.TAPS and "
        f"{key}.TEACHER_TAPS."
    )


def no_shared_output(student: nn.Module, teacher: nn.Module) -> str:
    """Returns sentences on the outputs of two backbones that share none, and on what else both have, for messages."""
    ours, theirs = (", ".join(_levels(model, student, teacher)) or "none" for model in (student, teacher))
    outputs = [output_shapes(architecture_of(model).backbone) for model in (student, teacher)]
    both = [n for n in tap_names(student) if n in tap_names(teacher) and not all(n in given for given in outputs)]
    within = f" Taps of both, not outputs of both, are {', '.join(both)}." if both else ""
    return f"the backbones share no output: the student's gives {ours}, the teacher's {theirs}.{within}"


def shared_predictions(student: nn.Module, teacher: nn.Module, kind: str, image_side: int = 0) -> list[tuple[str, str]]:
    """Returns the taps of student and teacher of the predictions of a kind that both make; maybe none.

    Left out are boxes of the levels that `shared_levels` leaves out for their size: hardly any object is that large, so
    the teacher has not learned those boxes, and the mean over so few of them drowns the other levels. Class scores
    there are right, they say that there is nothing.
    """
    ours, theirs = (
        {(p.location, p.place): p.tap for p in architecture_of(model).predictions() if p.kind == kind}
        for model in (student, teacher)
    )
    shared = [where for where in ours if where in theirs]
    if kind in ("box_deltas", "box_distribution"):
        levels = {where: _level(*where) for where in shared}
        small = _too_small(student, [level for level in levels.values() if level], image_side)
        shared = [where for where in shared if levels[where] not in small]
    return [(ours[where], theirs[where]) for where in shared]


def _level(location: str, place: Any) -> str:
    """The feature map of a prediction, "" where it is on regions; a place may name more than its map."""
    return "" if location != "anchor" else str(place[0] if isinstance(place, tuple) else place)


def shared_levels(student: nn.Module, teacher: nn.Module, image_side: int = 0) -> list[str]:
    """Returns the outputs that both backbones have, finest first.

    Left out are levels that merely pool the one below (R-CNN's p6), and, for images whose shorter side is `image_side`
    pixels, levels of fewer than four cells across: statistics over so few cells are noise, and imitating them drowns
    the other levels.
    """
    theirs = _levels(teacher, student, teacher)
    shared = [name for name in _levels(student, student, teacher) if name in theirs]
    small = _too_small(student, shared, image_side)
    return [name for name in shared if name not in small]


def _levels(model: nn.Module, student: nn.Module, teacher: nn.Module) -> list[str]:
    """The outputs of a model's backbone, finest first, without those that either network merely pools."""
    pooled = architecture_of(student).pooled_levels() | architecture_of(teacher).pooled_levels()
    return [name for name in architecture_of(model).feature_shapes() if name not in pooled]


def _too_small(model: nn.Module, levels: Sequence[str], image_side: int) -> list[str]:
    """Those of the levels with too few cells for images of that side; none where all have."""
    shapes = architecture_of(model).feature_shapes()
    cells = {name: shapes[name].stride or 1 for name in levels if name in shapes}
    small = [name for name, stride in cells.items() if 0 < image_side < MIN_LEVEL_SIZE * stride]
    if not small or len(small) == len(cells):
        return []
    logger.info("Too small to distil by default on images of %d pixels: %s", image_side, ", ".join(small))
    return small
