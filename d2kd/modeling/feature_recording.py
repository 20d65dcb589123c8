"""Recording maps of a teacher and of its student, at several times, over the same image and on the same grid."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from d2kd.distillers import AlignmentError, Distiller, TapPair
from d2kd.distillers.taps import check_alignable
from d2kd.layers import align_resolution

from .architectures import architecture_of, is_region_tap
from .taps import FeatureTaps, TapError, describe_taps, no_shared_output, shared_levels
from .teacher import Teacher

logger = logging.getLogger(__name__)

#: The role of the teacher; students have names of their own.
TEACHER = "teacher"


@dataclass(frozen=True)
class MapPair:
    """A pair of taps that are both maps, and how the student's channels become the teacher's.

    Attributes:
        pair: of student and teacher.
        align: from the student's map (N, Cs, H, W) to the teacher's channels; None where there is no such function.
        how: what that is, in words.
    """

    pair: TapPair
    align: Callable[[Tensor], Tensor] | None = None
    how: str = ""

    @property
    def name(self) -> str:
        """What it is called: the student's tap, with the teacher's where that has another name."""
        student, teacher = self.pair.student.name, self.pair.teacher.name
        return student if student == teacher else f"{student} <- {teacher}"


@dataclass(frozen=True)
class RecordedMap:
    """Maps of one pair over one image, on the teacher's grid and without what lies in the padding.

    Attributes:
        teacher: (Ct, H, W) float32 on the CPU.
        students: (Cs, H, W) by role.
        aligned: (Ct, H, W) by role, in the teacher's channels; empty where nothing aligns them.
    """

    teacher: Tensor
    students: Mapping[str, Tensor]
    aligned: Mapping[str, Tensor]


def pairs_of_distillers(distillers: Mapping[str, Distiller]) -> tuple[list[MapPair], dict[str, str]]:
    """Returns the pairs of maps that methods compare, each once, and why others are left out, by their name.

    Of several methods at a tap the first one that compares channel by channel aligns it.
    """
    found: dict[tuple[str, str], MapPair] = {}
    left_out: dict[str, str] = {}
    for method, distiller in distillers.items():
        for level, pair in enumerate(distiller.pairs):
            if pair.student.is_vector or pair.teacher.is_vector:
                left_out[str(pair.name)] = "a vector for each region or image, and no map"
                continue
            key = pair.student.name, pair.teacher.name
            if key not in found or found[key].align is None:
                found[key] = _as_compared(method, distiller, level)
    return list(found.values()), left_out


def _as_compared(method: str, distiller: Distiller, level: int) -> MapPair:
    pair = distiller.pairs[level]
    with torch.no_grad():
        probe = distiller.in_teacher_channels(level, _like(distiller, pair.student.channels))
    if probe is None:
        return MapPair(pair)
    layer = distiller.describe_alignment(level).partition(",")[0]
    words = f"as {method} compares them" + (
        f", through its trained {layer}" if "->" in layer else ", channel by channel"
    )
    return MapPair(pair, lambda x: _to_channels(distiller, level, x), words)


def _like(distiller: Distiller, channels: int) -> Tensor:
    device = next((p.device for p in distiller.parameters()), torch.device("cpu"))
    return torch.zeros(1, channels, 2, 2, device=device)


def _to_channels(distiller: Distiller, level: int, x: Tensor) -> Tensor:
    aligned = distiller.in_teacher_channels(level, x)
    assert aligned is not None  # as it was for the probe
    return aligned


def named_pairs(
    student: nn.Module,
    teacher: nn.Module,
    names: Sequence[str],
    known: Sequence[MapPair] = (),
    image_side: int = 0,
    key: str = "--taps",
) -> tuple[list[MapPair], dict[str, str]]:
    """Returns the pairs that somebody names, "p3" or "STUDENT=TEACHER", and why some are left out, by their name.

    Args:
        student, teacher: the models.
        names: [] stands for all that the outputs of the backbones have in common, by name or else by stride.
        known: of methods; a pair among them keeps what aligns it.
        image_side: shorter side of the images in pixels; of outputs that both have, those with fewer than four cells
            across are left out. 0 takes all.
        key: what the names come from, for messages.

    Raises:
        TapError: a tap is not there, or nothing is shared and nothing named.
        AlignmentError: strides are too far apart.
    """
    wanted = [_split(key, name) for name in names] or _shared(student, teacher, image_side, key)
    of_methods = {(m.pair.student.name, m.pair.teacher.name): m for m in known}
    left_out = {ours: _REGIONS for ours, theirs in wanted if _is_region(ours) or _is_region(theirs)}
    wanted = [(ours, theirs) for ours, theirs in wanted if ours not in left_out]
    described = describe_taps(student, [s for s, _ in wanted]) if wanted else {}
    theirs_described = describe_taps(teacher, [t for _, t in wanted]) if wanted else {}
    found = []
    for ours, theirs in dict.fromkeys(wanted):
        pair = TapPair(described[ours], theirs_described[theirs])
        if pair.student.is_vector or pair.teacher.is_vector:
            left_out[ours] = "a vector for each image, and no map"
            continue
        check_alignable(key, pair)
        found.append(of_methods.get((ours, theirs), MapPair(pair)))
    return found, left_out


_REGIONS = "a row for each region, and no map"


def _is_region(name: str) -> bool:
    try:
        return is_region_tap(name)
    except AlignmentError:
        return True


def _split(key: str, name: str) -> tuple[str, str]:
    ours, separator, theirs = name.partition("=")
    if not ours or (separator and not theirs):
        raise TapError(f"{key} {name!r}: name a tap of both networks (p3), or one of each (STUDENT=TEACHER).")
    return ours, theirs or ours


def _shared(student: nn.Module, teacher: nn.Module, image_side: int, key: str) -> list[tuple[str, str]]:
    """Outputs of the backbones with the same name, or else with the same stride."""
    same = [(name, name) for name in shared_levels(student, teacher, image_side)]
    if same:
        return same
    ours, theirs = (architecture_of(model).feature_shapes() for model in (student, teacher))
    by_stride = {shape.stride: name for name, shape in theirs.items() if shape.stride}
    found = [(name, by_stride[shape.stride]) for name, shape in ours.items() if shape.stride in by_stride]
    if not found:
        nothing = no_shared_output(student, teacher)
        raise TapError(f"{nothing[0].upper()}{nothing[1:]} Name maps with {key} STUDENT=TEACHER.")
    return found


class FeatureRecorder:
    """Runs a teacher and some students over an image, all in evaluation mode, as far as their deepest taps.

    Attributes:
        pairs: those that have given maps so far.
        left_out: why others have not, by name.
    """

    def __init__(self, teacher: Teacher, students: Mapping[str, nn.Module], pairs: Sequence[MapPair]) -> None:
        """
        Args:
            teacher: runs over the whole image, whatever pass a training uses.
            students: of one configuration, by role.
            pairs: what is recorded.

        Raises:
            TapError: a model has no such tap.
        """
        self.teacher = teacher
        self.students = {role: model.eval() for role, model in students.items()}
        self.pairs = list(pairs)
        self.left_out: dict[str, str] = {}

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, RecordedMap]:
        """Returns the maps over one image, by the name of their pair; pairs whose taps give none are left out.

        Args:
            inputs: Detectron2's format, what the student takes.
        """
        device = next(self.teacher.model.parameters()).device
        inputs = {**inputs, "image": inputs["image"].to(device)}
        while self.pairs:
            try:
                return self._record(inputs, self.pairs)
            except TapError:
                self._leave_out(inputs)
        return {}

    def _leave_out(self, inputs: dict[str, Any]) -> None:
        """Finds the pairs that fail on their own."""
        kept = []
        for pair in self.pairs:
            try:
                self._record(inputs, [pair])
                kept.append(pair)
            except TapError as error:
                self.left_out[pair.name] = str(error)
        if len(kept) == len(self.pairs):
            raise TapError("These taps fire each alone, and not together: name fewer of them with --taps.")
        self.pairs = kept

    def _record(self, inputs: dict[str, Any], pairs: Sequence[MapPair]) -> dict[str, RecordedMap]:
        theirs = self.teacher.record([inputs], FeatureTaps(self.teacher.model, [p.pair.teacher.name for p in pairs]))
        ours: dict[str, dict[str, Tensor]] = {}
        for role, model in self.students.items():
            taps = FeatureTaps(model, [p.pair.student.name for p in pairs])
            with taps.recording(stop_when_done=True) as features:
                model([inputs])
            ours[role] = features
        size = inputs["image"].shape[-2], inputs["image"].shape[-1]
        return {p.name: _on_one_grid(p, theirs, ours, size) for p in pairs}


def _on_one_grid(
    which: MapPair, theirs: Mapping[str, Tensor], ours: Mapping[str, Mapping[str, Tensor]], size: tuple[int, int]
) -> RecordedMap:
    student, teacher = which.pair
    whole = theirs[teacher.name].float()
    if which.align is not None and teacher.order is not None:
        whole = whole[:, list(teacher.order)]
    for feature in (whole, *(features[student.name] for features in ours.values())):
        if feature.dim() != 4:
            raise TapError(f"Tap {which.name!r} gives {tuple(feature.shape)}, and no map (N, C, H, W).")
    own = {role: features[student.name].float() for role, features in ours.items()}
    aligned = {} if which.align is None else {role: which.align(x) for role, x in own.items()}
    ratio = student.stride / teacher.stride
    rows, columns = (max(1, math.ceil(side / teacher.stride)) for side in size)

    def there(x: Tensor) -> Tensor:
        _, moved = align_resolution(whole, x, ratio)
        return moved[0, :, :rows, :columns].cpu()

    students = {role: there(x) for role, x in own.items()}
    height, width = next(iter(students.values())).shape[1:]
    return RecordedMap(whole[0, :, :height, :width].cpu(), students, {role: there(x) for role, x in aligned.items()})
