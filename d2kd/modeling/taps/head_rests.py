"""Heads that correspond: where a feature of the student's head enters the teacher's, and the frozen rest of that."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from d2kd.distillers import DISTILLERS, HeadRest, TapPair
from d2kd.errors import ConfigError
from detectron2.config import CfgNode

from ..architectures import HeadBranch, HeadLayer, architecture_of
from .address import TapError

if TYPE_CHECKING:
    from ..teacher import Teacher

_KINDS = {"class_logits": "classes", "box_deltas": "boxes"}


def head_features(node: CfgNode, key: str, student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
    """Returns the features in the student's head, each with the teacher's prediction that it is to lead to.

    Args:
        node: of the method, with POSITION and TEACHER_POSITION.
        key: of that node, for messages.

    Raises:
        ConfigError: the heads are not that deep, or the method's TAPS are set.
        TapError: the heads do not correspond.
    """
    for name in ("TAPS", "TEACHER_TAPS"):
        if node[name]:
            raise ConfigError(
                f"{key}.{name} is {list(node[name])}; this method finds its taps in the heads by {key}.POSITION and "
                f"TEACHER_POSITION: set it to []."
            )
    matched = _matched_branches(node, key, student, teacher)
    return [(layer.tap, theirs.prediction.tap) for layer, theirs, _ in matched]


def with_rests(
    cfg: CfgNode, method: str, pairs: Sequence[TapPair], student: nn.Module, teacher: "Teacher"
) -> list[TapPair]:
    """Returns the pairs of a method, each with the rest of the teacher's head where the method continues in it."""
    cls = DISTILLERS.get(method)
    if not cls.CONTINUES_HEAD:
        return list(pairs)
    matched = _matched_branches(cfg.DISTILL[cls.NODE], f"DISTILL.{cls.NODE}", student, teacher.model)
    return [
        TapPair(pair.student, pair.teacher._replace(rest=_rest(teacher, branch, position)))
        for pair, (_, branch, position) in zip(pairs, matched)
    ]


def _matched_branches(
    node: CfgNode, key: str, student: nn.Module, teacher: nn.Module
) -> list[tuple[HeadLayer, HeadBranch, int]]:
    """For each branch of the student: the layer whose feature is taken, the teacher's branch, its layers left out."""
    ours, theirs = (_branches(key, whose, model) for whose, model in (("student", student), ("teacher", teacher)))
    _require_same_places(key, ours, theirs)
    matched = []
    for place, branch in ours.items():
        other = theirs[place]
        if branch.stride != other.stride:
            raise TapError(
                f"{key}: the student's head has {place[2]} at stride {branch.stride:g}, the teacher's at stride "
                f"{other.stride:g}. Give both pyramids of the same strides ({_ADVICE}."
            )
        position = _position(f"{key}.POSITION", node.POSITION, branch, "student")
        left_out = node.TEACHER_POSITION
        if left_out == -1:
            left_out = max(1, len(other.layers) - len(branch.layers) + position)
        left_out = _position(f"{key}.TEACHER_POSITION", left_out, other, "teacher")
        ends, continued = branch.layers[position - 1], other.layers[left_out - 1]
        if ends.form != continued.form:
            raise TapError(
                f"{key}: {ends.tap} of the student gives {ends.form}, and the teacher's layers behind {continued.tap} "
                f"take {continued.form}: set {key}.POSITION and TEACHER_POSITION to layers of one kind, or make the "
                "heads alike (MODEL.ROI_BOX_HEAD)."
            )
        matched.append((ends, other, left_out))
    return matched


def _branches(key: str, whose: str, model: nn.Module) -> dict[tuple[str, str, Any], HeadBranch]:
    branches = architecture_of(model).head_branches()
    if not branches:
        raise TapError(
            f"{key}: the {whose}, a {type(model).__name__}, has no head whose layers d2kd knows, as RetinaNet, FCOS "
            "and R-CNNs with MODEL.ROI_BOX_HEAD.NAME FastRCNNConvFCHead have: take the method out of DISTILL.METHODS."
        )
    return {(b.prediction.kind, b.prediction.location, b.prediction.place): b for b in branches}


_Place = tuple[str, str, Any]
_ADVICE = (
    "MODEL.META_ARCHITECTURE, IN_FEATURES of the head, MODEL.ROI_HEADS.NAME), or take the method out of DISTILL.METHODS"
)


def _require_same_places(key: str, ours: Iterable[_Place], theirs: Iterable[_Place]) -> None:
    if set(ours) == set(theirs):
        return
    student, teacher = (", ".join(dict.fromkeys(_in_words(*place) for place in places)) for places in (ours, theirs))
    raise TapError(
        f"{key}: the heads do not correspond: the student's predicts {student}; the teacher's {teacher}. Give both the "
        f"same levels or stages ({_ADVICE}."
    )


def _in_words(kind: str, location: str, place: Any) -> str:
    where = f"stage {place} of regions" if location == "region" else str(place)
    return f"{_KINDS.get(kind, kind)} on {where}"


def _position(key: str, value: int, branch: HeadBranch, whose: str) -> int:
    """How many layers of a branch lie before the feature; -1 stands for all but the last, and at least one."""
    depth, what = len(branch.layers), _KINDS[branch.prediction.kind]
    if not depth:
        raise ConfigError(
            f"{key}: the {whose}'s head has no layer before its predictor of {what} (NUM_CONVS), so no feature in it."
        )
    position = max(1, depth - 1) if value == -1 else value
    if not 1 <= position <= depth:
        raise ConfigError(
            f"{key} is {value}, and the {whose}'s head has {depth} layers before its predictor of {what}: it must be "
            f"from 1 to {depth}, or -1."
        )
    return position


def _rest(teacher: "Teacher", branch: HeadBranch, position: int) -> HeadRest:
    modules = [module for layer in branch.layers[position:] for module in layer.modules]
    on_regions = branch.prediction.location == "region"

    def run(feature: Tensor) -> Tensor:
        with teacher.autocast():
            # under its own arithmetic the teacher does not take the student's half precision
            x = feature.to(next(branch.predictor.parameters()).dtype)
            for module in modules:
                x = module(x)
            prediction: Tensor = branch.predictor(x.flatten(1) if on_regions else x)
            return prediction

    return HeadRest(run, branch.layers[position - 1].channels, branch.decode)
