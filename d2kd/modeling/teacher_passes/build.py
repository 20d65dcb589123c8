"""Which pass gives each method its features, and running all of them around the student's forward pass."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from d2kd.config import config_check, get_key
from d2kd.distillers import DISTILLERS, TapPair
from d2kd.errors import ConfigError, require_choice
from detectron2.config import CfgNode

from ..architectures import is_region_tap
from ..feature_cache import FeatureCache
from ..teacher import BatchedInputs, Teacher
from .acceleration import Acceleration
from .base import TEACHER_PASSES, TeacherFeatures, TeacherPass
from .cached import CachedDensePass
from .clock import TeacherClock
from .dense import DensePass
from .regions import RegionPass
from .side_stream import SideStream

logger = logging.getLogger(__name__)

AUTO = "auto"


class TeacherPasses:
    """The passes of a run. One over the whole image comes first and serves all others; nothing is computed twice.

    Attributes:
        dense: the pass over the whole image; without taps it does not run.
        others: the other passes, by name.
        sources: names of the others that a method's features come from, beside the dense pass, by method.
        clock: of what the passes take in training, the reading of kept features included.
    """

    def __init__(
        self,
        dense: DensePass,
        others: Mapping[str, TeacherPass],
        sources: Mapping[str, Sequence[str]],
        concurrent: bool = False,
    ) -> None:
        """
        Args:
            dense: gives the `required_taps` of the others too.
            others, sources: see above.
            concurrent: passes that need nothing of the student run beside it, where it is on CUDA.
        """
        self.dense = dense
        self.others = dict(others)
        self.sources = {method: list(names) for method, names in sources.items()}
        self.clock = TeacherClock()
        self._beside = SideStream(concurrent)

    @contextlib.contextmanager
    def around_student(
        self, batched_inputs: BatchedInputs, methods: Sequence[str] | None = None, stored: bool = True
    ) -> Iterator[dict[str, TeacherFeatures]]:
        """Yields a dict that is filled, when the block (the student's forward pass) ends, with each method's features.

        Args:
            batched_inputs: in Detectron2's format, on the device.
            methods: only passes of these run, by default all.
            stored: whether features may come from a cache, and go there; not those of images that do not come again.
        """
        sources = {method: self.sources[method] for method in (self.sources if methods is None else methods)}
        others = {name: self.others[name] for names in sources.values() for name in names}
        run = self.dense if stored else self.dense.direct
        device = batched_inputs[0]["image"].device
        with self._beside, self.clock(device):
            dense = run(batched_inputs) if self.dense.taps else TeacherFeatures({}, {})
            computed = {n: p(batched_inputs, None, dense.maps) for n, p in others.items() if not p.needs_student}
        features: dict[str, TeacherFeatures] = {}
        with contextlib.ExitStack() as stack:
            guidance = {n: stack.enter_context(p.watch()) for n, p in others.items() if p.needs_student}
            yield features
        self._beside.join(tensor for given in (dense, *computed.values()) for of in given for tensor in of.values())
        with self.clock(device):
            computed |= {n: others[n](batched_inputs, seen, dense.maps) for n, seen in guidance.items()}
        for method, names in sources.items():
            features[method] = _together(dense, [computed[name] for name in names])

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of the passes that have one, by name."""
        return {name: state for name, other in self.others.items() if (state := other.state_dict())}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` has returned."""
        for name, state in states.items():
            self.others[name].load_state_dict(state)


def _together(dense: TeacherFeatures, others: Sequence[TeacherFeatures]) -> TeacherFeatures:
    """All features; those of the other passes override dense ones of the same tap."""
    maps, valid = dense
    for other in others:
        maps, valid = {**maps, **other.maps}, {**valid, **other.valid}
    return TeacherFeatures(maps, valid)


def build_passes(
    cfg: CfgNode, student: nn.Module, teacher: Teacher, pairs: Mapping[str, Sequence[TapPair]]
) -> TeacherPasses:
    """Returns the passes that give every method the features of its pairs.

    Args:
        pairs: of each method, by its name.

    Raises:
        ConfigError: TEACHER_PASS of a method names no pass, or one that computes parts of a map for a method that needs
            whole ones.
        TapError: a tap is not there, or cannot be computed by its pass.
    """
    groups: dict[str, list[TapPair]] = {}
    sources: dict[str, list[str]] = {method: [] for method in pairs}
    dense: list[str] = []
    for method, of_method in pairs.items():
        for pair in of_method:
            name = _pass_of(cfg, method, pair)
            if name == DensePass.__name__:
                dense.append(pair.teacher.name)
            else:
                groups.setdefault(name, []).append(pair)
                sources[method].append(name)
    others = {
        name: TEACHER_PASSES.get(name).from_config(cfg, student, teacher, group) for name, group in groups.items()
    }
    for method, names in sources.items():
        sources[method] = list(dict.fromkeys(names))
        if any(others[name].sparse for name in names) and not DISTILLERS.get(method).takes_validity():
            raise ConfigError(
                f"DISTILL.{DISTILLERS.get(method).NODE}.TEACHER_PASS is {names[0]}, which computes parts of the "
                f"teacher's maps; {method} needs whole maps: set it to {AUTO}."
            )
    required = [tap for other in others.values() for tap in other.required_taps]
    acceleration = Acceleration.from_config(cfg)
    whole = _dense_pass(cfg, teacher, [*dense, *required], others, acceleration)
    concurrent = acceleration.stream and cfg.MODEL.DEVICE.startswith("cuda")
    return TeacherPasses(whole, others, sources, concurrent=concurrent)


def _dense_pass(
    cfg: CfgNode,
    teacher: Teacher,
    taps: Sequence[str],
    others: Mapping[str, TeacherPass],
    acceleration: Acceleration,
) -> DensePass:
    """The pass over the whole image: with DISTILL.CACHE.DIR, from there."""
    if not cfg.DISTILL.CACHE.DIR:
        return DensePass(teacher, taps, acceleration)
    steered = [name for name, other in others.items() if other.needs_student]
    if steered:
        logger.warning(
            "DISTILL.CACHE does not keep what %s gives: it depends on the student, and is computed in every step%s.",
            " and ".join(steered),
            ", from maps of the whole image that are kept" if taps else "",
        )
    if not taps:
        logger.warning("DISTILL.CACHE.DIR has no effect: no method compares features that can be kept.")
        return DensePass(teacher, taps, acceleration)
    return CachedDensePass(teacher, taps, FeatureCache.from_config(cfg, teacher, taps), acceleration)


def _pass_of(cfg: CfgNode, method: str, pair: TapPair) -> str:
    node = DISTILLERS.get(method).NODE
    name = cfg.DISTILL[node].TEACHER_PASS
    if name == DensePass.__name__ and is_region_tap(pair.teacher.name):
        raise ConfigError(
            f"DISTILL.{node}.TEACHER_PASS is {name}, and {pair.teacher.name} gives rows of the teacher's own regions "
            f"there: set it to {AUTO}, for those of the student."
        )
    if name != AUTO:
        return name
    return RegionPass.__name__ if is_region_tap(pair.teacher.name) else DensePass.__name__


@config_check
def check_passes(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: TEACHER_PASS of a method names no pass.
    """
    known = [AUTO, *sorted(name for name, _ in TEACHER_PASSES)]
    for _, method in DISTILLERS:
        key = f"DISTILL.{method.NODE}.TEACHER_PASS"
        require_choice(key, get_key(cfg, key, AUTO), known)
