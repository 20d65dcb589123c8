"""DistilledModel: a student that learns from its task and a teacher's features; at inference, the student alone."""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2kd.distillers import Distiller, FeatureMaps, WeightSchedule
from detectron2.utils.events import EventStorage, get_event_storage, has_event_storage

from .architectures import architecture_of
from .balance import GradientBalance
from .taps import FeatureTaps, TapError, evaluation_mode, is_in_backbone
from .teacher import BatchedInputs, Teacher
from .teacher_passes import TeacherPasses


class DistilledModel(nn.Module):
    """A student, a teacher and the methods between them.

    In training it returns the student's losses plus "distill/<method>/<tap>" for every method and level; otherwise what
    the student returns. Only student and distillers are submodules: `student.state_dict()` has plain Detectron2 keys,
    and the teacher is in no `state_dict`.
    """

    def __init__(
        self,
        student: nn.Module,
        passes: TeacherPasses,
        distillers: Mapping[str, Distiller],
        balance: GradientBalance | None = None,
        task_weight: float = 1.0,
        every: int = 1,
        schedules: Mapping[str, WeightSchedule] | None = None,
        recipe: Mapping[str, Any] | None = None,
        initialized: Iterable[str] = (),
    ) -> None:
        """
        Args:
            student: any Detectron2 model.
            passes: give every teacher tap that the distillers name.
            distillers: by the name that their losses carry.
            balance: measures, logs or scales the methods' gradients; None does neither.
            task_weight: factor on the student's own losses.
            every: teacher and methods take part in every n-th iteration, with losses n times as large.
            schedules: of the methods' weights, by method; a method without one keeps its weight.
            recipe: the keys that the default recipe has set, with their values; for those who ask.
            initialized: the student's parameters and buffers that start as the teacher's; for those who ask.
        """
        super().__init__()
        self.student = student
        self.passes = passes
        self.distillers = nn.ModuleDict(distillers)
        self.task_weight = task_weight
        self.every = every
        self.schedules = {m: s for m, s in (schedules or {}).items() if not s.always_one}
        self.recipe = dict(recipe or {})
        self.initialized = frozenset(initialized)
        self._calls = 0
        self.set_balance(balance)

    def __deepcopy__(self, memo: dict[int, Any]) -> "DistilledModel":
        # copies share the teacher, which is frozen; taps name its modules before it comes itself
        memo |= {id(module): module for network in self.passes.dense.networks for module in network.modules()}
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        vars(other).update(copy.deepcopy(vars(self), memo))
        return other

    def set_balance(self, balance: GradientBalance | None, also: Sequence[str] = ()) -> None:
        """Sets what measures, logs or scales the methods' gradients; None does neither.

        Args:
            balance: is given the features that task and methods share, and behind them those of `also`.
            also: further taps of the student.
        """
        self.balance = balance
        taps = [pair.student.name for d in self.distillers.values() for pair in d.pairs]  # type: ignore[union-attr]
        self._balanced_taps = [*_shared_taps(self.student, taps), *also] if balance is not None else []
        self._taps = FeatureTaps(self.student, [*taps, *self._balanced_taps])

    @property
    def teacher(self) -> Teacher:
        """The frozen teacher."""
        return self.passes.dense.teacher

    @property
    def device(self) -> torch.device:
        """Where the student lives."""
        return next(self.student.parameters()).device

    @property
    def iteration(self) -> int:
        """Number of the iteration, from 0: that of the `EventStorage` around it, or else of the steps so far."""
        return int(get_event_storage().iter) if has_event_storage() else self._calls

    def is_over(self, method: str) -> bool:
        """Returns whether the weight of a method is 0 by its schedule, now and in all later iterations."""
        return method in self.schedules and self.schedules[method].is_over(self.iteration)

    def forward(self, batched_inputs: BatchedInputs) -> Any:
        """
        Args:
            batched_inputs: Detectron2's input format; in training with ground truth.

        Returns:
            In training a dict of scalar losses, else the student's output.

        Raises:
            TapError: a tap did not fire, or a method gave no loss.
        """
        if not self.training:
            return self.student(batched_inputs)
        with self._storage():
            return self._losses(batched_inputs)

    def takes_part(self, iteration: int) -> bool:
        """Returns whether teacher and methods take part in an iteration, counted from the first one of the run."""
        return iteration % self.every == 0

    @contextlib.contextmanager
    def _storage(self) -> Iterator[None]:
        """Detectron2's models write numbers into the storage of a training loop, which one's own may not have."""
        with contextlib.nullcontext() if has_event_storage() else EventStorage(self._calls):
            yield
        self._calls += 1

    def _losses(self, batched_inputs: BatchedInputs) -> dict[str, Tensor]:
        if not self.distillers:
            return dict(self.student(batched_inputs))
        batched_inputs = self._to_device(batched_inputs)
        if not self.takes_part(self.iteration):
            return self._task_alone(batched_inputs)
        active = [method for method in self.distillers if not self.is_over(method)]
        with contextlib.ExitStack() as stack:
            student, teacher = {}, {}
            if active:  # else nothing needs the teacher any more
                methods = self._methods_of_passes(active)
                teacher = stack.enter_context(self.passes.around_student(batched_inputs, methods))
                student = stack.enter_context(self._taps.recording())
            losses = dict(self.student(batched_inputs))
        if self.task_weight != 1.0:
            losses = {name: self.task_weight * loss for name, loss in losses.items()}
        self._show_boxes(batched_inputs)
        distilled = {
            method: _named_losses(method, distiller(student, *teacher[method]))
            if method in active
            else _zero_losses(method, distiller, self.device)
            for method, distiller in self.distillers.items()
        }
        self._show_boxes(None)
        factors = {method: schedule.factor(self.iteration) for method, schedule in self.schedules.items()}
        if self.balance is not None and active:
            features = [student[name] for name in self._balanced_taps]
            distilled = self.balance(losses, distilled, features, factors)
        for method, named in distilled.items():
            factor = self.every * factors.get(method, 1.0) if method in active else 1.0
            losses.update(named if factor == 1.0 else {name: factor * loss for name, loss in named.items()})
        for method, factor in factors.items():
            get_event_storage().put_scalar(f"schedule/{method}", factor, smoothing_hint=False)
        return losses

    def _task_alone(self, batched_inputs: BatchedInputs) -> dict[str, Tensor]:
        """The student's losses of an iteration without a teacher; what methods train has a gradient of 0 there.

        So all processes of a data-parallel run wait for the same gradients in every iteration.
        """
        losses = {name: self.task_weight * loss for name, loss in self.student(batched_inputs).items()}
        trained = [p.sum() for p in self.distillers.parameters() if p.requires_grad]
        if trained:
            name = next(iter(losses))
            losses[name] = losses[name] + 0.0 * sum(trained)
        return losses

    def _methods_of_passes(self, active: Sequence[str]) -> Sequence[str] | None:
        """Those of the active methods, where the others have passes that need not run; None, all, where not."""
        spares = any(self.passes.sources[method] for method in self.distillers if method not in active)
        return active if spares else None

    def _show_boxes(self, batched_inputs: BatchedInputs | None) -> None:
        """Gives the ground truth's boxes, where there are some, to the methods that look at them."""
        for distiller in self.distillers.values():
            assert isinstance(distiller, Distiller)
            if distiller.uses_boxes:
                truth = [x["instances"] for x in batched_inputs or () if "instances" in x]
                distiller.boxes = [x.gt_boxes.tensor for x in truth if x.has("gt_boxes")] or None

    @torch.no_grad()
    def extract_features(
        self, method: str, batches: Iterable[BatchedInputs]
    ) -> Iterator[tuple[FeatureMaps, FeatureMaps]]:
        """Yields the features (student's, teacher's) that a method compares, both networks in evaluation mode.

        Each network runs once a batch, and as far as its deepest tap.
        """
        distiller = self.distillers[method]
        assert isinstance(distiller, Distiller)
        taps = FeatureTaps(self.student, [pair.student.name for pair in distiller.pairs])
        steers = any(self.passes.others[name].needs_student for name in self.passes.sources[method])
        for batch in batches:
            batch = self._to_device(batch)
            with self.passes.around_student(batch, [method], stored=False) as teacher, evaluation_mode(self.student):
                with taps.recording(stop_when_done=not steers) as student:
                    self.student(batch)
            yield student, teacher[method].maps

    def _to_device(self, batched_inputs: BatchedInputs) -> BatchedInputs:
        """One copy of the images serves both networks."""
        return [{**x, "image": x["image"].to(self.device, non_blocking=True)} for x in batched_inputs]


def _shared_taps(student: nn.Module, taps: Sequence[str]) -> list[str]:
    """What the gradients of task and methods share: the taps in the backbone, or all that it gives to the heads."""
    in_backbone = [name for name in taps if is_in_backbone(student, name)]
    return list(dict.fromkeys(in_backbone)) or list(architecture_of(student).feature_shapes())


def _zero_losses(method: str, distiller: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Losses 0 of a method that no longer teaches; its parameters get gradients 0, as data parallelism expects."""
    assert isinstance(distiller, Distiller)
    zero = torch.zeros((), device=device)
    first, *others = [f"distill/{method}/{pair.name}" for pair in distiller.pairs]
    connected = sum((0.0 * p.sum() for p in distiller.parameters() if p.requires_grad), start=zero)
    return {first: connected, **dict.fromkeys(others, zero)}


def _named_losses(method: str, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not losses:
        raise TapError(f"Method {method} gave no loss: check DISTILL.METHODS and its taps.")
    for tap, loss in losses.items():
        if loss.dim():
            raise TapError(f"Method {method} gave a loss of shape {tuple(loss.shape)} at {tap}: it must be a scalar.")
    return {f"distill/{method}/{tap}": loss for tap, loss in losses.items()}
