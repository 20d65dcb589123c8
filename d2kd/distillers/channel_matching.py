"""ChannelMatching: each student channel learns from teacher channels of its own ("MGD", 2020, arXiv 2008.09958)."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2kd.layers import AlignmentError, RandomMasks, check_reduction
from d2kd.layers.assignment import AssignmentError, assign_channels, check_remainder, check_solver
from d2kd.layers.channel_groups import check_reducer, norm_margin, one_sided_error, reduce_groups, scale_to_unit
from d2kd.layers.normalize import check_mode
from detectron2.config import CfgNode
from detectron2.layers import get_norm
from detectron2.utils import comm

from .base import DISTILLERS, Distiller, TapPair
from .matching_schedule import MatchingSchedule, preset
from .matching_statistics import MatchingStatistics
from .token_file import weights_checksum

logger = logging.getLogger(__name__)

ADAPTERS = ("bn", "syncbn", "gn", "none")


@DISTILLERS.register()
class ChannelMatching(Distiller):
    """Squared error, one-sided below zero, between student channels and what their teacher channels are reduced to.

    From time to time an assignment decides which teacher channels belong to which student channel (`refresh`); in
    between it is fixed. No aligner is learned: a norm per level is all that stands between the student's map and the
    loss. The maps are those before the last ReLU of a stage.
    """

    CONFIG_NODE = "CHANNEL_MATCHING"

    def __init__(
        self,
        *,
        pairs: Sequence[TapPair],
        weight: float,
        schedule: MatchingSchedule,
        reducer: str = "amp",
        remainder: str = "shave",
        adapter: str = "bn",
        factors: Sequence[float] = (),
        normalize: str = "none",
        reduction: str = "paper",
        solver: str = "ortools",
        random: RandomMasks | None = None,
    ) -> None:
        """
        Args:
            pairs, weight: see `Distiller`.
            schedule: when to track and to assign anew.
            reducer: "amp", "amp_signed", "sp", "rd" or "sm", see `reduce_groups`.
            remainder: "shave" or "best", see `assign_channels`.
            adapter: norm between the student's map and the loss: "bn", "syncbn", "gn" (32 groups, or as many as divide
                both 32 and the channels) or "none".
            factors: the loss of each level is divided by its factor; by default by 1.
            normalize: "none", or "standardize": divide the reduced map and its margin by the map's deviation.
            reduction: "paper": sum over channels and positions, mean over images; "mean" over all elements.
            solver: "ortools" or "scipy".
            random: what the reducer "rd" draws from; by default a sequence with seed 0.

        Raises:
            AlignmentError: a student map has more channels than the teacher's.
            ValueError: an argument is out of range.
        """
        super().__init__(pairs=pairs, weight=weight)
        check_reducer(reducer)
        check_remainder(remainder)
        check_solver(solver)
        check_mode(normalize)
        check_reduction(reduction)
        self.schedule = schedule
        self.reducer = reducer
        self.remainder = "best" if reducer == "sm" else remainder
        self.normalize = normalize
        self.reduction = reduction
        self.solver = solver
        self.random = random or RandomMasks()
        self.factors = self.factors_of_pairs("FACTORS (or that of its PRESET)", factors)
        if 0.0 in self.factors:
            raise ValueError(f"DISTILL.{self.CONFIG_NODE}.FACTORS is {self.factors}; losses are divided by them: no 0.")
        self.adapters = nn.ModuleList([build_adapter(adapter, p.student_shape.channels) for p in self.pairs])
        self.statistics = MatchingStatistics(self.pairs)
        for level, pair in enumerate(self.pairs):
            self.register_buffer(f"members{level}", self._unassigned(pair))
            self.register_buffer(f"margin{level}", _margin(pair))
        #: training batches seen by this process
        self.batches = 0
        self._assigned = False
        self._teacher = ""

    def check_pairs(self, pairs: Sequence[TapPair]) -> None:
        """Raises AlignmentError where resolutions are too far apart, or the teacher has fewer channels."""
        super().check_pairs(pairs)
        for pair in pairs:
            if pair.student_shape.channels > pair.teacher_shape.channels:
                raise AlignmentError(
                    f"DISTILL.{self.CONFIG_NODE}.TAPS, {pair.student} <- {pair.teacher}: the student's map has "
                    f"{pair.student_shape.channels} channels, the teacher's only {pair.teacher_shape.channels}; every "
                    f"student channel needs a teacher channel. Leave this level out of DISTILL.{self.CONFIG_NODE}.TAPS."
                )

    def check_teacher(self, teacher: nn.Module) -> None:
        """Remembers whose channels these are, for `get_extra_state`."""
        self._teacher = weights_checksum(teacher.state_dict())

    @classmethod
    def from_config(cls, node: CfgNode, pairs: Sequence[TapPair]) -> dict[str, Any]:
        settings = {**node, **preset(node.PRESET)}
        return {
            **super().from_config(node, pairs),
            "schedule": MatchingSchedule(
                iterations=tuple(settings["REFRESH_ITERS"]),
                periods=tuple(settings["REFRESH_PERIODS"]),
                steps=tuple(settings["REFRESH_STEPS"]),
                images=settings["TRACK_IMAGES"],
                tracking=settings["TRACKING"],
            ),
            "reducer": settings["REDUCER"],
            "remainder": settings["REMAINDER"],
            "adapter": settings["ADAPTER"],
            "factors": settings["FACTORS"],
            "normalize": settings["NORMALIZE"],
            "reduction": settings["REDUCTION"],
            "solver": settings["SOLVER"],
            "random": RandomMasks(seed=settings["SEED"], stream=comm.get_rank()),
        }

    @classmethod
    def build(cls, cfg: CfgNode, pairs: Sequence[TapPair]) -> "ChannelMatching":
        """As in the base class; the schedule knows what an iteration of the solver is."""
        settings = cls.from_config(cfg.DISTILL[cls.CONFIG_NODE], pairs)
        settings["schedule"] = dataclasses.replace(
            settings["schedule"],
            images_per_iteration=cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.ACCUMULATE,
            batches_per_iteration=cfg.SOLVER.ACCUMULATE,
        )
        return cls(**settings)

    def forward(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, Tensor]:
        """As in the base class; tracks and assigns first where the schedule says so.

        Raises:
            AssignmentError: the features are not finite; or there is no assignment, and only a pass may make one.
        """
        if self.schedule.online:
            tracks = self.schedule.tracks(self.batches)
            if tracks or not self.assigned:
                self.track(student, teacher)
            if self.schedule.refreshes(self.batches) or not (tracks or self.assigned):
                self.refresh()
            elif not self.assigned:  # until the first window is full, what its first batch says must do
                self.assign()
        elif not self.assigned:
            raise AssignmentError(
                "ChannelMatching has no assignment yet. With DISTILL.CHANNEL_MATCHING.TRACKING 'pass' the trainer's "
                "hook makes one before the first step; outside the trainer use 'online', or call `track` and `refresh`."
            )
        losses = super().forward(student, teacher)
        self.batches += 1
        return losses

    def level_loss(self, level: int, student: Tensor, teacher: Tensor) -> Tensor:
        student = self.adapters[level](student)
        with torch.no_grad():
            margin, members = self.get_buffer(f"margin{level}"), self.get_buffer(f"members{level}")
            reduced = reduce_groups(teacher, margin, members, self.reducer, self.random.uniform)
            if self.normalize == "standardize":
                reduced = scale_to_unit(reduced)
        return one_sided_error(student, reduced, self.reduction) / self.factors[level]

    @property
    def assigned(self) -> bool:
        """Whether there is an assignment."""
        return self._assigned

    @property
    def pass_due(self) -> bool:
        """Whether a tracking pass has to run before the next step."""
        return not self.schedule.online and (not self.assigned or self.schedule.refreshes(self.batches))

    @torch.no_grad()
    def track(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> None:
        """Adds a batch of all processes to what the next assignment rests on; all processes must call it."""
        maps = [self.aligned(level, student, teacher) for level in range(len(self.pairs))]
        self.statistics.add([s.detach() for s, _ in maps], [t.detach() for _, t in maps])

    def refresh(self) -> None:
        """Assigns channels by the statistics, and starts new ones."""
        self.assign()
        self.statistics.reset()

    @torch.no_grad()
    def assign(self) -> None:
        """Assigns channels by the statistics, on the main process for all; all processes must call it.

        Raises:
            AssignmentError: nothing finite was tracked, or the solver failed.
        """
        images = self.statistics.images
        if not images:
            taps = ", ".join(f"{pair.student} <- {pair.teacher}" for pair in self.pairs)
            raise AssignmentError(
                f"Channels of {taps} cannot be matched: no tracked batch had finite features in both networks; "
                "evaluate both as they start (--eval-only, --eval-teacher)."
            )
        for level, pair in enumerate(self.pairs):
            cost = self.statistics.cost(level)
            members, before = self._solve(cost, pair).to(cost.device), self.get_buffer(f"members{level}")
            distance = cost.gather(1, members).mean() / images
            moved = (owners(members, cost.shape[1]) != owners(before, cost.shape[1])).float().mean()
            before.copy_(members)
            if pair.teacher_norm is None:
                self.get_buffer(f"margin{level}").copy_(self.statistics.mean_negative(level))
            logger.info(
                "Matched %s <- %s from %d images: mean distance %.3f, %.0f%% of the teacher's channels changed owner",
                pair.student,
                pair.teacher,
                images,
                distance.item(),
                100 * moved.item() if self.assigned else 100.0,
            )
        self._assigned = True

    def _solve(self, cost: Tensor, pair: TapPair) -> Tensor:
        members, error = self._unassigned(pair).to(cost.device), None
        if comm.is_main_process():
            try:
                mean = cost / self.statistics.images
                members.copy_(assign_channels(mean, members.shape[1], self.remainder, self.solver))
            except Exception as caught:  # raised when the others have been told, or they would wait forever
                error = caught
        if comm.get_world_size() > 1:
            dist.broadcast(members, src=0)
        if error is not None:
            raise error
        if bool((members < 0).any()):
            raise AssignmentError("The main process found no assignment of channels; its log says why.")
        return members

    def _unassigned(self, pair: TapPair) -> Tensor:
        students, teachers = pair.student_shape.channels, pair.teacher_shape.channels
        return torch.full((students, 1 if self.reducer == "sm" else teachers // students), -1)

    @property
    def fingerprint(self) -> str:
        """What an assignment belongs to: the teacher's weights, and the taps."""
        return " ".join([self._teacher, *(f"{pair.student}<-{pair.teacher}" for pair in self.pairs)])

    def get_extra_state(self) -> dict[str, Any]:
        """Position in the schedule and in the random sequence, and which teacher this belongs to."""
        return {
            "batches": self.batches,
            "assigned": self.assigned,
            "random": self.random.state(),
            "fingerprint": self.fingerprint,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continues from a checkpoint.

        Raises:
            AssignmentError: the assignment was made for another teacher.
        """
        if state["fingerprint"] != self.fingerprint:
            raise AssignmentError(
                "The channel assignment in the checkpoint was made for another teacher (DISTILL.TEACHER.WEIGHTS) or "
                "other taps (DISTILL.CHANNEL_MATCHING.TAPS)"
            )
        self.batches, self._assigned = int(state["batches"]), bool(state["assigned"])
        self.random.load_state(state["random"])


def build_adapter(kind: str, channels: int) -> nn.Module:
    """The norm between a student's map and the loss.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in ADAPTERS:
        raise ValueError(f"DISTILL.CHANNEL_MATCHING.ADAPTER is {kind!r}; it must be one of {', '.join(ADAPTERS)}.")
    if kind == "none":
        return nn.Identity()
    if kind == "gn":
        return nn.GroupNorm(math.gcd(32, channels), channels)
    return nn.BatchNorm2d(channels) if kind == "bn" else get_norm("naiveSyncBN", channels)


def owners(members: Tensor, teacher_channels: int) -> Tensor:
    """The student channel that owns each teacher channel, (Ct,), -1 for none; from members (Cs, k)."""
    owner = members.new_full((teacher_channels,), -1)
    rows = torch.arange(len(members), device=members.device)[:, None].expand_as(members)
    taken = members >= 0
    owner[members[taken]] = rows[taken]
    return owner


def _margin(pair: TapPair) -> Tensor:
    if pair.teacher_norm is None:
        return torch.zeros(pair.teacher_shape.channels)
    return norm_margin(pair.teacher_norm.weight, pair.teacher_norm.bias).float().cpu()
