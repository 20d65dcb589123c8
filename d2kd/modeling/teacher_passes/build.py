"""Which pass gives each method its features, and running all of them around the student's forward pass."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from d2kd.distillers import DISTILLERS, TapPair
from d2kd.errors import ConfigError, require_choice
from detectron2.config import CfgNode

from ..architectures import is_region_tap
from ..teacher import Inputs, Teacher
from .base import TEACHER_PASSES, TeacherFeatures, TeacherPass
from .dense import DensePass
from .regions import RegionPass

AUTO = "auto"


class TeacherPasses:
    """The passes of a run. One over the whole image comes first and serves all others; nothing is computed twice.

    Attributes:
        dense: the pass over the whole image; without taps it does not run.
        others: the other passes, by name.
    """

    def __init__(
        self,
        dense: DensePass,
        others: Mapping[str, TeacherPass] | None = None,
        sources: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """
        Args:
            dense: gives the `inputs` of the others too.
            others: by name.
            sources: names of the others that a method's features come from, beside the dense pass, by method.
        """
        self.dense = dense
        self.others = dict(others or {})
        self.sources = dict(sources or {})

    @contextlib.contextmanager
    def around_student(self, batched_inputs: Inputs, method: str = "") -> Iterator["PassResults"]:
        """Yields the results: dense features at once, those of steered passes when the block (the student) ends."""
        results = PassResults(self.sources)
        others = self.of_method(method) if method else self.others
        if self.dense.taps:
            results.add("", self.dense(batched_inputs))
        for name, other in others.items():
            if not other.needs_student:
                results.add(name, other(batched_inputs, None, results.dense))
        steered = {name: other for name, other in others.items() if other.needs_student}
        with contextlib.ExitStack() as stack:
            guidance = {name: stack.enter_context(other.watch()) for name, other in steered.items()}
            yield results
        for name, other in steered.items():
            results.add(name, other(batched_inputs, guidance[name], results.dense))

    def of_method(self, method: str) -> dict[str, TeacherPass]:
        """Returns the passes that a method's features come from, beside the dense one."""
        return {name: self.others[name] for name in self.sources.get(method, ())}

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of the passes that have one, by name."""
        states = {name: other.state_dict() for name, other in self.others.items()}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` has returned."""
        for name, state in states.items():
            self.others[name].load_state_dict(state)


class PassResults:
    """What the passes gave in one step."""

    def __init__(self, sources: Mapping[str, Sequence[str]]) -> None:
        self._sources = sources
        self._of_pass: dict[str, TeacherFeatures] = {"": TeacherFeatures({}, {})}

    @property
    def dense(self) -> dict[str, Tensor]:
        """The maps of the pass over the whole image."""
        return self._of_pass[""].maps

    def add(self, name: str, features: TeacherFeatures) -> None:
        """Takes in the features of a pass."""
        self._of_pass[name] = features

    def of_method(self, method: str) -> TeacherFeatures:
        """Returns the features that a method compares."""
        sources = self._sources.get(method)
        if not sources:
            return self._of_pass[""]
        maps, valid = dict(self.dense), {}
        for name in sources:
            maps.update(self._of_pass[name].maps)
            valid.update(self._of_pass[name].valid)
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
    sources: dict[str, list[str]] = {}
    dense: list[str] = []
    for method, of_method in pairs.items():
        for pair in of_method:
            name = _pass_of(cfg, method, pair)
            if name == DensePass.__name__:
                dense.append(pair.teacher.name)
            else:
                groups.setdefault(name, []).append(pair)
                sources.setdefault(method, []).append(name)
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
    inputs = [tap for other in others.values() for tap in other.inputs]
    return TeacherPasses(DensePass(teacher, [*dense, *inputs]), others, sources)


def _pass_of(cfg: CfgNode, method: str, pair: TapPair) -> str:
    node = DISTILLERS.get(method).NODE
    name = cfg.DISTILL[node].TEACHER_PASS
    require_choice(f"DISTILL.{node}.TEACHER_PASS", name, [AUTO, *sorted(known for known, _ in TEACHER_PASSES)])
    if name != AUTO:
        return name
    return RegionPass.__name__ if is_region_tap(pair.teacher.name) else DensePass.__name__
