"""DistilledModel: a student that learns from its task and from a teacher's features; its inference is the student alone."""

import difflib
import logging
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from d2kd.distillers import DISTILLERS, Distiller, TapPair
from d2kd.layers import TapShape

from .inherit import InheritReport, inherit, plan_inheritance
from .num_classes import num_classes
from .taps import FeatureTaps, TapError, tap_names
from .teacher import Teacher, load_teacher, teacher_config

logger = logging.getLogger(__name__)

#: Side of the blank image, in pixels, that shows the shapes of tapped features.
_PROBE_SIZE = 128


class MethodError(ValueError):
    """`DISTILL.METHODS` names a method that is not there, or none where one is needed."""


class DistilledModel(nn.Module):
    """A student, a teacher and the methods between them.

    In training it returns the student's losses plus "distill/<method>/<tap>" for every method and level; otherwise what the student returns.
    Only student and distillers are submodules: `student.state_dict()` has plain Detectron2 keys, and the teacher is in no `state_dict`.
    """

    def __init__(self, student: nn.Module, teacher: Teacher, distillers: Mapping[str, Distiller]) -> None:
        """
        Args:
            student: any Detectron2 model.
            teacher: gives every teacher tap that the distillers name.
            distillers: by the name that their losses carry.
        """
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.distillers = nn.ModuleDict(distillers)
        self._taps = FeatureTaps(student, [pair.student for d in distillers.values() for pair in d.pairs])

    @property
    def device(self) -> torch.device:
        """Where the student lives."""
        return next(self.student.parameters()).device

    def forward(self, batched_inputs: List[Dict[str, Any]]) -> Any:
        """
        Args:
            batched_inputs: Detectron2's input format; in training with ground truth.

        Returns:
            In training a dict of scalar losses, else the student's output.

        Raises:
            TapError: a tap did not fire, or a method gave no loss.
        """
        if not self.training or not self.distillers:
            return self.student(batched_inputs)
        # one copy to the device serves both networks
        batched_inputs = [{**x, "image": x["image"].to(self.device, non_blocking=True)} for x in batched_inputs]
        # the teacher comes first: what it needs in passing is free again before the student's graph grows
        teacher_features = self.teacher.features(batched_inputs)
        with self._taps.recording() as student_features:
            losses = dict(self.student(batched_inputs))
        for method, distiller in self.distillers.items():
            losses.update(_named_losses(method, distiller(student_features, teacher_features)))
        return losses


def _named_losses(method: str, losses: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    if not losses:
        raise TapError(f"Method {method} gave no loss: check DISTILL.METHODS and its taps.")
    return {f"distill/{method}/{tap}": loss for tap, loss in losses.items()}


def is_distillation(cfg: CfgNode) -> bool:
    """Whether the configuration names a teacher."""
    return bool(cfg.DISTILL.TEACHER.CONFIG_FILE)


def build_distilled_model(cfg: CfgNode) -> DistilledModel:
    """Student, teacher and distillers as the configuration describes them.

    The student is built first, exactly as without distillation, and what follows leaves the global random state alone: so a student
    starts from the same weights with and without a teacher.

    Raises:
        TeacherError, TapError, AlignmentError, ValueError: what does not fit, with the configuration key to change.
    """
    methods = _methods(cfg)
    student = build_model(cfg)
    with torch.random.fork_rng(devices=[]):
        teacher_cfg = teacher_config(cfg)
        teacher = load_teacher(teacher_cfg)
        if cfg.DISTILL.INHERIT.ENABLED:  # whatever cannot be inherited must be known before a run begins
            plan_inheritance(student, teacher, cfg.DISTILL.INHERIT.EXCLUDE, _class_counts(cfg, teacher_cfg))
        pairs = _pairs_of_methods(cfg, methods, student, teacher)
        distillers = {name: DISTILLERS.get(name).build(cfg, pairs[name]).to(cfg.MODEL.DEVICE) for name in methods}
        for distiller in distillers.values():
            distiller.check_teacher(teacher)
    return DistilledModel(
        student,
        Teacher(
            teacher,
            [pair.teacher for method in pairs.values() for pair in method],
            precision=cfg.DISTILL.TEACHER.PRECISION,
            swap_channels={cfg.INPUT.FORMAT, teacher_cfg.INPUT.FORMAT} == {"RGB", "BGR"},
        ),
        distillers,
    )


def inherit_from_teacher(cfg: CfgNode, model: DistilledModel) -> Optional[InheritReport]:
    """Starts the student's neck and heads from the teacher's, where `DISTILL.INHERIT` says so; see `inherit`."""
    if not cfg.DISTILL.INHERIT.ENABLED:
        return None
    classes = _class_counts(cfg, teacher_config(cfg))
    return inherit(model.student, model.teacher.model, cfg.DISTILL.INHERIT.EXCLUDE, classes)


def _class_counts(cfg: CfgNode, teacher_cfg: CfgNode) -> Optional[Tuple[int, int]]:
    counts = [num_classes(cfg), num_classes(teacher_cfg)]
    return None if None in counts else (counts[0][1], counts[1][1])


def _methods(cfg: CfgNode) -> List[str]:
    known = sorted(name for name, _ in DISTILLERS)
    if not cfg.DISTILL.METHODS and not cfg.DISTILL.INHERIT.ENABLED:
        raise MethodError(
            f"A teacher is configured, but nothing uses it: name one or more of {', '.join(known)} in DISTILL.METHODS, "
            "or set DISTILL.INHERIT.ENABLED True."
        )
    for name in cfg.DISTILL.METHODS:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2, cutoff=0.4)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise MethodError(f"DISTILL.METHODS (--method) names {name!r}, which is none of {', '.join(known)}.{hint}")
    return list(dict.fromkeys(cfg.DISTILL.METHODS))


def _pairs_of_methods(
    cfg: CfgNode, methods: Sequence[str], student: nn.Module, teacher: nn.Module
) -> Dict[str, List[TapPair]]:
    names = {}
    for method in methods:
        key = DISTILLERS.get(method).CONFIG_NODE
        names[method] = _tap_names_of(f"DISTILL.{key}", cfg.DISTILL[key], student, teacher)
    student_shapes = tap_shapes(student, [s for pairs in names.values() for s, _ in pairs])
    teacher_shapes = tap_shapes(teacher, [t for pairs in names.values() for _, t in pairs])
    return {
        method: [TapPair(s, t, student_shapes[s], teacher_shapes[t]) for s, t in pairs]
        for method, pairs in names.items()
    }


def _tap_names_of(key: str, node: CfgNode, student: nn.Module, teacher: nn.Module) -> List[Tuple[str, str]]:
    ours = list(node.TAPS) or shared_levels(student, teacher)
    theirs = list(node.TEACHER_TAPS) or ours
    if not ours:
        raise TapError(
            f"{key}.TAPS is empty, and the backbones share no output: the student's has {', '.join(tap_names(student))}, "
            f"the teacher's {', '.join(tap_names(teacher))}. Name the features in {key}.TAPS and {key}.TEACHER_TAPS."
        )
    if len(ours) != len(theirs):
        raise TapError(
            f"{key}.TAPS names {len(ours)} features and {key}.TEACHER_TAPS {len(theirs)}; they are compared pair by pair."
        )
    return list(zip(ours, theirs))


def shared_levels(student: nn.Module, teacher: nn.Module) -> List[str]:
    """Outputs that both backbones have, finest first, without levels that merely pool the one below (R-CNN's p6)."""
    pooled = _pooled_levels(student) | _pooled_levels(teacher)
    theirs = teacher.backbone.output_shape()
    return [name for name in student.backbone.output_shape() if name in theirs and name not in pooled]


def _pooled_levels(model: nn.Module) -> set:
    backbone = model.backbone
    top = getattr(backbone, "top_block", None)
    if top is None or any(True for _ in top.parameters()):
        return set()
    return set(list(backbone.output_shape())[-top.num_levels :])


@torch.no_grad()
def tap_shapes(model: nn.Module, names: Sequence[str]) -> Dict[str, TapShape]:
    """Channels and strides of tapped features, seen on a blank image.

    Raises:
        TapError: a tap is unknown, does not fire, fires twice, or is no feature map (N, C, H, W).
    """
    was_training = model.training
    device = next(model.parameters()).device
    blank = torch.zeros(3, _PROBE_SIZE, _PROBE_SIZE, dtype=torch.uint8, device=device)
    widths: List[int] = []
    handle = model.backbone.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[-1]))
    taps = FeatureTaps(model, names)
    in_backbone = all(tap.name.partition(".")[0] in tap_names(model) for tap in taps.taps)
    model.eval()
    try:
        with torch.random.fork_rng(), taps.recording(stop_when_done=in_backbone) as features:
            model([{"image": blank, "height": _PROBE_SIZE, "width": _PROBE_SIZE}])
    finally:
        handle.remove()
        model.train(was_training)
    for name, feature in features.items():
        if feature.dim() != 4:
            raise TapError(
                f"Tap {name!r} has the shape {tuple(feature.shape)}; only feature maps (N, C, H, W) can be distilled."
            )
    return {name: TapShape(f.shape[1], widths[0] / f.shape[-1]) for name, f in features.items()}
