"""Heads that correspond: where a feature of the student's head enters the teacher's, and the frozen rest of that."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from d2kd.config import get_key
from d2kd.distillers import DISTILLERS, HeadRest, TapPair
from d2kd.errors import ConfigError
from detectron2.config import CfgNode

from ..architectures import HeadBranch, architecture_of
from .address import TapError

if TYPE_CHECKING:
    from ..teacher import Teacher

_KINDS = {"class_logits": "classes", "box_deltas": "boxes", "box_distribution": "distributions of boxes"}


class _Match(NamedTuple):
    """A branch of the student's head, and that of the teacher's head which its features enter."""

    #: What is compared: a feature in the student's branch, or its prediction, where all behind the feature is the
    #: teacher's anyway (DISTILL.INIT_FROM_TEACHER.FREEZE) and need not run twice.
    tap: str
    teacher: HeadBranch
    #: Layers of the teacher's branch that are left out; None for all, and its predictor.
    left_out: int | None


def head_features(cfg: CfgNode, method: str, student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
    """Returns the features in the student's head, each with the teacher's prediction that it is to lead to.

    Args:
        cfg: with POSITION and TEACHER_POSITION in the node of the method.
        method: by name.
        student, teacher: what the student takes from its teacher and keeps is frozen by now.

    Raises:
        ConfigError: the heads are not that deep, or the method's TAPS are set.
        TapError: the heads do not correspond.
    """
    key = f"DISTILL.{DISTILLERS.get(method).NODE}"
    node = get_key(cfg, key)
    for name in ("TAPS", "TEACHER_TAPS"):
        if node[name]:
            raise ConfigError(
                f"{key}.{name} is {list(node[name])}; this method finds its taps in the heads by {key}.POSITION and "
                f"TEACHER_POSITION: set it to []."
            )
    return [(match.tap, match.teacher.prediction.tap) for match in _matched_branches(cfg, key, student, teacher)]


def with_rests(
    cfg: CfgNode, method: str, pairs: Sequence[TapPair], student: nn.Module, teacher: "Teacher"
) -> list[TapPair]:
    """Returns the pairs of a method, each with the rest of the teacher's head where the method continues in it."""
    cls = DISTILLERS.get(method)
    if not cls.CONTINUES_HEAD:
        return list(pairs)
    matched = _matched_branches(cfg, f"DISTILL.{cls.NODE}", student, teacher.model)
    return [
        TapPair(pair.student, pair.teacher._replace(rest=_rest(teacher, match, pair.teacher.channels)))
        for pair, match in zip(pairs, matched)
    ]


def _matched_branches(cfg: CfgNode, key: str, student: nn.Module, teacher: nn.Module) -> list[_Match]:
    node = get_key(cfg, key)
    kept = _kept_parameters(cfg, student)
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
        if _parameters(branch, position) <= kept and _names(branch, position) == _names(other, left_out):
            matched.append(_Match(branch.prediction.tap, other, None))
        else:
            matched.append(_Match(ends.tap, other, left_out))
    return matched


def _kept_parameters(cfg: CfgNode, student: nn.Module) -> set[nn.Parameter]:
    """What stays as the teacher has it."""
    prefixes = tuple(cfg.DISTILL.INIT_FROM_TEACHER.FREEZE)
    return {parameter for name, parameter in student.named_parameters() if prefixes and name.startswith(prefixes)}


def _parameters(branch: HeadBranch, position: int) -> set[nn.Parameter]:
    """Those behind a feature in a branch."""
    modules = [branch.predictor, *(module for layer in branch.layers[position:] for module in layer.modules)]
    return {parameter for module in modules for parameter in module.parameters()}


def _names(branch: HeadBranch, position: int) -> list[str]:
    """Of the layers behind a feature in a branch."""
    return [*(layer.tap for layer in branch.layers[position:]), branch.prediction.tap]


def _branches(key: str, whose: str, model: nn.Module) -> dict[tuple[str, str, Any], HeadBranch]:
    branches = architecture_of(model).head_branches()
    if not branches:
        raise TapError(
            f"{key}: the {whose}, a {type(model).__name__}, has no head whose layers d2kd knows, as RetinaNet, FCOS, "
            "GFL and R-CNNs with MODEL.ROI_BOX_HEAD.NAME FastRCNNConvFCHead have: take the method out of "
            "DISTILL.METHODS."
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


def _rest(teacher: "Teacher", match: _Match, channels: int) -> HeadRest:
    """What of the teacher's head is behind the feature; `channels` are those of its prediction."""
    branch = match.teacher
    if match.left_out is None:
        return HeadRest(lambda prediction: prediction, channels, branch.decode)
    modules = [module for layer in branch.layers[match.left_out :] for module in layer.modules]
    on_regions = branch.prediction.location == "region"

    def run(feature: Tensor) -> Tensor:
        with teacher.autocast():
            # under its own arithmetic the teacher does not take the student's half precision
            x = feature.to(next(branch.predictor.parameters()).dtype)
            for module in modules:
                x = module(x)
            prediction: Tensor = branch.predictor(x.flatten(1) if on_regions else x)
            return prediction

    return HeadRest(run, branch.layers[match.left_out - 1].channels, branch.decode)
