"""DistilledModel: a student that learns from its task and from a teacher's features; its inference is the student alone."""

import contextlib
import difflib
import logging
from typing import Any, ContextManager, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from d2kd.distillers import DISTILLERS, Distiller, NormAffine, TapPair
from d2kd.layers import TapShape

from .balance import GradientBalance
from .inherit import InheritReport, inherit, plan_inheritance
from .num_classes import num_classes
from .prediction_taps import check_same_meaning, shared_predictions, what_taps_hold
from .roi_outputs import SampledRegions, is_region_tap, student_stage
from .taps import FeatureTaps, TapError, last_norm, tap_names
from .teacher import Teacher, load_teacher, teacher_config

logger = logging.getLogger(__name__)

#: Levels with fewer cells across are not distilled unless a recipe names them.
_FEWEST_CELLS = 4
#: Side of the blank image, in pixels, that shows the shapes of tapped features.
_PROBE_SIZE = 128


class MethodError(ValueError):
    """`DISTILL.METHODS` names a method that is not there, or none where one is needed."""


class DistilledModel(nn.Module):
    """A student, a teacher and the methods between them.

    In training it returns the student's losses plus "distill/<method>/<tap>" for every method and level; otherwise what the student returns.
    Only student and distillers are submodules: `student.state_dict()` has plain Detectron2 keys, and the teacher is in no `state_dict`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        distillers: Mapping[str, Distiller],
        balance: Optional[GradientBalance] = None,
    ) -> None:
        """
        Args:
            student: any Detectron2 model.
            teacher: gives every teacher tap that the distillers name.
            distillers: by the name that their losses carry.
            balance: measures, logs or scales the methods' gradients; None does neither.
        """
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.distillers = nn.ModuleDict(distillers)
        self.balance = balance
        taps = [pair.student for d in distillers.values() for pair in d.pairs]
        self._shared_taps = _shared_taps(student, taps) if balance is not None else []
        self._taps = FeatureTaps(student, [*taps, *self._shared_taps])
        self._regions = SampledRegions(student) if teacher.needs_regions else None

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
        with self._taps.recording() as student_features, self._recording_regions() as regions:
            losses = dict(self.student(batched_inputs))
        if self._regions is not None:
            teacher_features.update(self.teacher.region_features(teacher_features, regions))
        distilled = {
            method: _named_losses(method, distiller(student_features, teacher_features))
            for method, distiller in self.distillers.items()
        }
        if self.balance is not None:
            distilled = self.balance(losses, distilled, [student_features[name] for name in self._shared_taps])
        for named in distilled.values():
            losses.update(named)
        return losses

    @torch.no_grad()
    def observe(
        self, distiller: Distiller, batched_inputs: List[Dict[str, Any]]
    ) -> Tuple[Dict[str, Tensor], Dict[str, Tensor]]:
        """What a method would compare, both networks in evaluation mode, each run once and as far as its deepest tap.

        Returns:
            Maps of the student and of the teacher by tap name.
        """
        batched_inputs = [{**x, "image": x["image"].to(self.device, non_blocking=True)} for x in batched_inputs]
        was_training = self.student.training
        self.student.eval()
        taps = FeatureTaps(self.student, [pair.student for pair in distiller.pairs])
        try:
            with taps.recording(stop_when_done=True) as student_features:
                self.student(batched_inputs)
        finally:
            self.student.train(was_training)
        return student_features, self.teacher.features(batched_inputs)

    def _recording_regions(self) -> ContextManager:
        return contextlib.nullcontext() if self._regions is None else self._regions.recording()


def _shared_taps(student: nn.Module, taps: Sequence[str]) -> List[str]:
    """Features that the gradients of task and methods have in common: the taps in the backbone, or all that it gives to the heads."""
    in_backbone = [name for name in taps if _is_in_backbone(student, name)]
    return list(dict.fromkeys(in_backbone)) or list(student.backbone.output_shape())


def _is_in_backbone(model: nn.Module, tap: str) -> bool:
    return tap.partition(".")[0] in tap_names(model)


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
        _check_classes(cfg, teacher_cfg, methods)
        pairs = _pairs_of_methods(cfg, methods, student, teacher)
        distillers = {name: DISTILLERS.get(name).build(cfg, pairs[name]).to(cfg.MODEL.DEVICE) for name in methods}
        for distiller in distillers.values():
            distiller.check_teacher(teacher)
    plain, region_taps = _split_teacher_taps(student, [pair for method in pairs.values() for pair in method])
    return DistilledModel(
        student,
        Teacher(
            teacher,
            plain,
            region_taps=region_taps,
            precision=cfg.DISTILL.TEACHER.PRECISION,
            swap_channels={cfg.INPUT.FORMAT, teacher_cfg.INPUT.FORMAT} == {"RGB", "BGR"},
        ),
        distillers,
        GradientBalance.from_config(cfg, methods),
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
        key, what = DISTILLERS.get(method).CONFIG_NODE, DISTILLERS.get(method).PREDICTION
        names[method] = _tap_names_of(
            f"DISTILL.{key}", cfg.DISTILL[key], student, teacher, what, min(cfg.INPUT.MIN_SIZE_TRAIN, default=0)
        )
        if what:
            check_same_meaning(f"DISTILL.{key}", names[method], student, teacher)
    student_shapes = tap_shapes(student, [s for pairs in names.values() for s, _ in pairs])
    teacher_shapes = tap_shapes(teacher, [t for pairs in names.values() for _, t in pairs])
    holds = what_taps_hold(student)
    return {
        method: [
            TapPair(s, t, student_shapes[s], teacher_shapes[t], holds.get(s, ""), _norm_before(teacher, t, teacher_shapes[t]))
            for s, t in pairs
        ]
        for method, pairs in names.items()
    }


def _norm_before(teacher: nn.Module, tap: str, shape: TapShape) -> Optional[NormAffine]:
    norm = None if is_region_tap(tap) else last_norm(teacher, tap)
    if norm is None or norm.running_var.numel() != shape.channels:
        return None
    weight, bias = norm.weight, norm.bias
    if weight is None:  # a norm without scale and shift
        return NormAffine(torch.ones_like(norm.running_var), torch.zeros_like(norm.running_var))
    return NormAffine(weight.detach(), bias.detach())


def _split_teacher_taps(student: nn.Module, pairs: Sequence[TapPair]) -> Tuple[List[str], List[Tuple[int, str]]]:
    """Taps of the teacher's own forward pass, and those of its box head with the stage of the student that gives the regions."""
    regions = [pair for pair in pairs if is_region_tap(pair.teacher)]
    plain = [pair.teacher for pair in pairs if not is_region_tap(pair.teacher)]
    return plain, list(dict.fromkeys((student_stage(student, pair.student), pair.teacher) for pair in regions))


def _check_classes(cfg: CfgNode, teacher_cfg: CfgNode, methods: Sequence[str]) -> None:
    ours, theirs = num_classes(cfg), num_classes(teacher_cfg)
    for method in methods:
        logits = DISTILLERS.get(method).PREDICTION == "logits"
        if logits and ours is not None and theirs is not None and ours[1] != theirs[1]:
            raise MethodError(
                f"{method} compares class scores: the student has {ours[1]} classes ({ours[0]}), the teacher {theirs[1]} "
                f"({theirs[0]} of DISTILL.TEACHER.CONFIG_FILE). Give both the same classes, or take {method} out of DISTILL.METHODS."
            )


def _tap_names_of(
    key: str, node: CfgNode, student: nn.Module, teacher: nn.Module, what: str = "", image_side: int = 0
) -> List[Tuple[str, str]]:
    if what:
        shared = shared_predictions(student, teacher, what)
    else:
        shared = [(name, name) for name in shared_levels(student, teacher, image_side)]
    ours = list(node.TAPS) or [s for s, _ in shared]
    theirs = list(node.TEACHER_TAPS) or (ours if node.TAPS else [t for _, t in shared])
    if what and not ours:
        raise TapError(
            f"{key}.TAPS is empty, and a {type(student).__name__} and a {type(teacher).__name__} make no {what} at the same places "
            f"that d2kd knows. Name the modules in {key}.TAPS and {key}.TEACHER_TAPS, e.g. ['head.bbox_pred@0']."
        )
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


def shared_levels(student: nn.Module, teacher: nn.Module, image_side: int = 0) -> List[str]:
    """Outputs that both backbones have, finest first.

    Left out are levels that merely pool the one below (R-CNN's p6), and, for images whose shorter side is `image_side` pixels, levels
    of fewer than four cells across: statistics over so few cells are noise, and imitating them drowns the other levels.
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


@torch.no_grad()
def tap_shapes(model: nn.Module, names: Sequence[str]) -> Dict[str, TapShape]:
    """Channels and strides of tapped features, seen on a blank image.

    Raises:
        TapError: a tap is unknown, does not fire, fires twice, or is neither a feature map (N, C, H, W) nor a vector (R, C) a
            region or image.
    """
    was_training = model.training
    device = next(model.parameters()).device
    blank = torch.zeros(3, _PROBE_SIZE, _PROBE_SIZE, dtype=torch.uint8, device=device)
    widths: List[int] = []
    handle = model.backbone.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[-1]))
    taps = FeatureTaps(model, names)
    in_backbone = all(_is_in_backbone(model, tap.name) for tap in taps.taps)
    model.eval()
    try:
        with torch.random.fork_rng(), taps.recording(stop_when_done=in_backbone) as features:
            model([{"image": blank, "height": _PROBE_SIZE, "width": _PROBE_SIZE}])
    finally:
        handle.remove()
        model.train(was_training)
    for name, feature in features.items():
        if feature.dim() not in (2, 4):
            raise TapError(
                f"Tap {name!r} has the shape {tuple(feature.shape)}; only feature maps (N, C, H, W) and vectors (R, C) can be distilled."
            )
    return {n: TapShape(f.shape[1], widths[0] / f.shape[-1] if f.dim() == 4 else 0.0) for n, f in features.items()}
