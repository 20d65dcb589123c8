"""Where a Detectron2 model makes its predictions, which of them two models share, and whether these mean the same."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from d2kd.layers import AlignmentError

from .roi_outputs import REGION_PREFIX, stages


class Prediction(NamedTuple):
    """One predicting layer of a model, or one call of it."""

    tap: str
    # "logits" or "deltas"
    what: str
    # kind of predictor and its place: equal in models that can be compared
    place: tuple[str, Any]
    # what the distillers know it by, e.g. "dense logits"
    holds: str


def predictions(model: nn.Module) -> list[Prediction]:
    """All class logits and box deltas of a model, as far as d2kd knows its architecture."""
    return [*_dense(model), *_regions(model), *_pixels(model), *_images(model)]


def shared_predictions(student: nn.Module, teacher: nn.Module, what: str) -> list[tuple[str, str]]:
    """Taps of student and teacher of the predictions that both make, "logits" or "deltas"; maybe none."""
    theirs = {p.place: p.tap for p in predictions(teacher) if p.what == what}
    return [(p.tap, theirs[p.place]) for p in predictions(student) if p.what == what and p.place in theirs]


def what_taps_hold(model: nn.Module) -> dict[str, str]:
    """`Prediction.holds` by tap."""
    return {p.tap: p.holds for p in predictions(model)}


def check_same_meaning(key: str, pairs: Sequence[tuple[str, str]], student: nn.Module, teacher: nn.Module) -> None:
    """Raises AlignmentError where two predictions count from other anchors or boxes, naming the configuration keys.

    Args:
        key: the configuration node of the method.
        pairs: taps of student and teacher.
        student, teacher: the models.
    """
    ours, theirs = ({p.tap: p for p in predictions(model)} for model in (student, teacher))
    for s, t in pairs:
        if s not in ours or t not in theirs:
            continue
        where = f"{key}.TAPS, {s} <- {t}"
        if ours[s].holds != theirs[t].holds:
            raise AlignmentError(f"{where}: the student's are {ours[s].holds}, the teacher's {theirs[t].holds}.")
        if ours[s].holds.startswith("dense"):
            anchors = _anchors(student, ours[s].place[1]), _anchors(teacher, theirs[t].place[1])
            _same(where, "anchors (width x height; MODEL.ANCHOR_GENERATOR.SIZES and ASPECT_RATIOS)", *anchors)
        if ours[s].holds == "dense deltas":
            _same(where, "encoding of boxes (BBOX_REG_WEIGHTS)", _encoding(student), _encoding(teacher))
        if ours[s].holds == "region deltas":
            _check_region_deltas(where, student, ours[s].place[1], teacher, theirs[t].place[1])


def _check_region_deltas(where: str, student: nn.Module, stage: int, teacher: nn.Module, their_stage: int) -> None:
    ours, theirs = stages(student)[stage].predictor, stages(teacher)[their_stage].predictor
    agnostic = [x.bbox_pred.out_features == 4 for x in (ours, theirs)]
    _same(where, "class-agnostic setting of boxes (MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG)", *agnostic)
    key = "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS, of a cascade MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS"
    _same(where, f"encoding of boxes ({key})", _encoding(ours), _encoding(theirs))


def _same(where: str, what: str, ours: Any, theirs: Any) -> None:
    if ours != theirs:
        raise AlignmentError(f"{where}: student and teacher must have the same {what}, but have {ours} and {theirs}.")


def _encoding(module: nn.Module) -> Any:
    """How boxes become deltas: a class and its numbers."""
    transform = getattr(module, "box2box_transform", None)
    weights = getattr(transform, "weights", None)
    return type(transform).__name__, weights and tuple(weights), getattr(transform, "normalize_by_size", None)


def _anchors(model: nn.Module, feature: str) -> str:
    """Sizes of the anchors on one level, "" for a model without them."""
    cells = list(getattr(getattr(model, "anchor_generator", None), "cell_anchors", ()))
    if not cells:
        return ""
    boxes = cells[list(model.head_in_features).index(feature)].tolist()
    return ", ".join(f"{x1 - x0:.4g}x{y1 - y0:.4g}" for x0, y0, x1, y1 in boxes)


def _dense(model: nn.Module) -> list[Prediction]:
    """RetinaNet, FCOS and their like: a head whose layers run once a level."""
    head, levels = getattr(model, "head", None), getattr(model, "head_in_features", ())
    found = []
    for what, layer in (("logits", "cls_score"), ("deltas", "bbox_pred")):
        if isinstance(getattr(head, layer, None), nn.Module):
            found += [
                Prediction(f"head.{layer}@{i}", what, ("dense", name), f"dense {what}") for i, name in enumerate(levels)
            ]
    return found


def _regions(model: nn.Module) -> list[Prediction]:
    """The box predictor of an R-CNN, one a stage in a cascade."""
    found = []
    for number, stage in enumerate(stages(model)):
        sigmoid = "sigmoid " if getattr(stage.predictor, "use_sigmoid_ce", False) else ""
        for what, layer, kind in (("logits", "cls_score", sigmoid), ("deltas", "bbox_pred", "")):
            if isinstance(getattr(stage.predictor, layer, None), nn.Module):
                tap = f"{REGION_PREFIX}box_predictor{stage.suffix}.{layer}"
                found.append(Prediction(tap, what, ("region", number), f"region {kind}{what}"))
    return found


def _pixels(model: nn.Module) -> list[Prediction]:
    """The last layer of a segmentor's head, before its upsampling."""
    if isinstance(getattr(getattr(model, "sem_seg_head", None), "predictor", None), nn.Module):
        return [Prediction("sem_seg_head.predictor", "logits", ("pixel", None), "pixel logits")]
    return []


def _images(model: nn.Module) -> list[Prediction]:
    """The classifier on top of a backbone such as Detectron2's ResNet."""
    backbone = getattr(model, "backbone", None)
    if hasattr(backbone, "output_shape") and "linear" in backbone.output_shape():
        return [Prediction("linear", "logits", ("image", None), "image logits")]
    return []
