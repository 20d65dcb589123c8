"""ChannelMatching: each student channel learns from teacher channels of its own ("MGD", 2020, arXiv 2008.09958)."""

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2kd.config import config_check
from d2kd.errors import ConfigError
from d2kd.layers import RandomMasks, own_or_runs_seed
from d2kd.settings import SORTED, setting
from detectron2.config import CfgNode
from detectron2.layers import get_norm
from detectron2.utils import comm

from ..base import DISTILLERS, CalibrationRequest, FeatureDistiller, FeatureMaps
from ..checksum import weights_checksum
from ..taps import AlignmentError, TapPair
from .assignment import REMAINDERS, SOLVERS, AssignmentError, assign_channels
from .channel_groups import REDUCERS, norm_margin, one_sided_error, reduce_groups, scale_to_unit
from .schedule import TRACKING, MatchingSchedule
from .statistics import MatchingStatistics

logger = logging.getLogger(__name__)

ADAPTERS = ("bn", "syncbn", "gn", "none")


def _inverse(factors: list[float]) -> list[float]:
    if not isinstance(factors, (list, tuple)) or not all(0 < factor < math.inf for factor in factors):
        raise ValueError("no list of positive numbers")
    return [1 / factor for factor in factors]


def _preset_is_recipe(name: str) -> None:
    recipes = {
        "coco": "configs/COCO/retinanet_R18_R50_ChannelMatching_1x.yaml",
        "imagenet": "configs/ImageNet/mobilenetv1_R50_ChannelMatching_130e.yaml",
        "cub200": "configs/CUB200/mobilenetv2_R50_ChannelMatching.yaml",
    }
    if name:
        recipe = recipes.get(name.partition("_")[0], "configs/COCO, configs/ImageNet and configs/CUB200")
        raise ConfigError(
            f"DISTILL.CHANNEL_MATCHING.PRESET {name} no longer exists: its settings are those of {recipe}; copy them."
        )


@DISTILLERS.register()
class ChannelMatching(FeatureDistiller):
    """The teacher's channels that are assigned to the student's, before the last ReLU of a stage (arXiv 2008.09958).

    Squared error, one-sided below zero, between student channels and what their teacher channels are reduced to.
    From time to time an assignment decides which teacher channels belong to which student channel (`refresh`); in
    between it is fixed. No aligner is learned: a norm per level is all that stands between the student's map and the
    loss. The maps are those before the last ReLU of each stage; those of the teacher must not have fewer channels.
    NORMALIZE "standardize" divides the teacher's reduced map by its standard deviation, and leaves zero where the ReLU
    cuts. With the published settings (see the recipes) and WEIGHT 1 an image has the published effective weight.

    Example:
        >>> tap = "res5.pre_relu"
        >>> matching = ChannelMatching(pairs=[TapPair(TapInfo(tap, 512, 32), TapInfo(tap, 2048, 32))])
        >>> losses = matching({tap: student_map}, {tap: teacher_map})
    """

    RENAMED_KEYS = {
        "SOLVER": ("ASSIGNMENT_SOLVER", str),
        "FACTORS": ("TAP_WEIGHTS", _inverse),
        "PRESET": ("", _preset_is_recipe),
    }
    DEFAULTS = {"TAPS": ["res2.pre_relu", "res3.pre_relu", "res4.pre_relu", "res5.pre_relu"]}

    reducer: str = setting(
        "amp",
        "What a student channel's teacher channels are reduced to: amp (the value of largest magnitude) | amp_signed "
        "(the largest value, as in the first public code, which the published numbers may be from) | sp (the largest "
        "value and margin) | rd (a random one) | sm (each student channel has one teacher channel only).",
        choices=tuple(REDUCERS),
    )
    adapter: str = setting(
        "bn",
        "Norm between the student's map and the loss: bn | syncbn | gn (32 groups, or as many as divide both 32 and "
        "the channels) | none.",
        choices=ADAPTERS,
    )
    remainder: str = setting(
        "shave",
        "Where the student's channels do not divide the teacher's: shave leaves the last ones out | best those that "
        "are best left out.",
        choices=REMAINDERS,
    )
    refresh_iters: list[int] = setting(
        [],
        "Channels are assigned anew at these iterations; [] follows the rule: every REFRESH_PERIODS[0] iterations, "
        "after REFRESH_STEPS[0] iterations every REFRESH_PERIODS[1], and so on.",
        items=int,
        at_least=0,
        iterations=True,
    )
    refresh_periods: list[int] = setting(
        [5000, 31000], "Iterations between assignments.", items=int, at_least=1, iterations=True
    )
    refresh_steps: list[int] = setting(
        [20000],
        "Iterations at which the next period begins, ascending.",
        items=int,
        at_least=0,
        rule=SORTED,
        iterations=True,
    )
    tracking: str = setting(
        "online",
        "online: an assignment rests on the training batches before it (the first one on those after it, and on the "
        "first batch until then) | pass: on a pass of its own over training images, both networks in evaluation mode, "
        "as in the paper.",
        choices=TRACKING,
    )
    track_images: int = setting(2000, "Images, of all processes, that an assignment rests on.", at_least=1)
    assignment_solver: str = setting("ortools", "ortools | scipy, to the same cost.", choices=tuple(SOLVERS))
    seed: int = setting(-1, "Seed of the reducer rd; -1 = SEED of the run.", at_least=-1)

    def __init__(
        self,
        *,
        pairs: Sequence[TapPair],
        images_per_iteration: int = 16,
        batches_per_iteration: int = 1,
        **settings: Any,
    ) -> None:
        """
        Args:
            pairs, settings: see `Distiller`.
            images_per_iteration: training images of all processes.
            batches_per_iteration: batches that a process accumulates.

        Raises:
            AlignmentError: a student map has more channels than the teacher's.
            ConfigError: a setting is out of range.
        """
        super().__init__(pairs=pairs, **settings)
        self.schedule = MatchingSchedule(
            iterations=tuple(self.refresh_iters),
            periods=tuple(self.refresh_periods),
            steps=tuple(self.refresh_steps),
            images=self.track_images,
            tracking=self.tracking,
            images_per_iteration=images_per_iteration,
            batches_per_iteration=batches_per_iteration,
        )
        self.random = RandomMasks(self.seed, stream=comm.get_rank())
        self.adapters = nn.ModuleList([build_adapter(self.adapter, p.student.channels) for p in self.pairs])
        self.statistics = MatchingStatistics(self.pairs)
        for level, pair in enumerate(self.pairs):
            self.register_buffer(f"assignment{level}", self._unassigned(pair))
            self.register_buffer(f"margin{level}", _margin(pair))
        #: training batches seen by this process
        self.batches = 0
        self._assigned = False
        self._teacher = ""

    @classmethod
    def from_config(cls, cfg: CfgNode, pairs: Sequence[TapPair]) -> dict[str, Any]:
        """As in the base class; the schedule knows what an iteration of the solver is."""
        arguments = super().from_config(cfg, pairs)
        return {
            **arguments,
            "seed": own_or_runs_seed(arguments["seed"], cfg.SEED),
            "images_per_iteration": cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.ACCUMULATE,
            "batches_per_iteration": cfg.SOLVER.ACCUMULATE,
        }

    def check_pair(self, key: str, pair: TapPair) -> None:
        """Raises AlignmentError where resolutions are too far apart, or the teacher has fewer channels."""
        super().check_pair(key, pair)
        if pair.student.channels > pair.teacher.channels:
            raise AlignmentError(
                f"{key}, {pair}: the student's map has {pair.student.channels} channels, the teacher's only "
                f"{pair.teacher.channels}; every student channel needs a teacher channel. Leave this level out of "
                f"{key}."
            )

    def describe_alignment(self, level: int) -> str:
        """As in the base class: channels are assigned, and none is made of others."""
        student, teacher = self.pairs[level]
        assigned = f"{teacher.channels} channels assigned to {student.channels}"
        return ", ".join(part for part in (assigned, super().describe_alignment(level)) if part != "none")

    def check_teacher(self, teacher: nn.Module) -> None:
        """Remembers whose channels these are, for `get_extra_state`."""
        self._teacher = weights_checksum(teacher.state_dict())

    def forward(
        self, student: FeatureMaps, teacher: FeatureMaps, valid: FeatureMaps | None = None
    ) -> dict[str, Tensor]:
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
                "hook makes one before the first step; in a loop of your own call `d2kd.calibrate(model, loader)` "
                "before each step, or use 'online'."
            )
        losses = super().forward(student, teacher, valid)
        self.batches += 1
        return losses

    def changing_buffers(self) -> list[Tensor]:
        """As in the base class; the statistics, of up to 45 MB, only before a step that tracks."""
        step = range(self.batches, self.batches + self.schedule.batches_per_iteration)
        tracks = self.schedule.online and (not self.assigned or any(map(self.schedule.tracks, step)))
        return [b for b in self.buffers() if tracks or b is not self.statistics.sums]

    def level_loss(self, level: int, student: Tensor, teacher: Tensor) -> Tensor:
        student = self.adapters[level](student)
        with torch.no_grad():
            margin, assignment = self.get_buffer(f"margin{level}"), self.get_buffer(f"assignment{level}")
            reduced = reduce_groups(teacher, margin, assignment, self.reducer, self.random.uniform)
            if self.normalize == "standardize":
                reduced = scale_to_unit(reduced)
        return one_sided_error(student, reduced, self.reduction)

    @property
    def assigned(self) -> bool:
        """Whether there is an assignment."""
        return self._assigned

    def calibration_request(self) -> CalibrationRequest | None:
        """Returns the tracking pass that is due before the next step, if TRACKING is "pass"."""
        due = not self.schedule.online and (not self.assigned or self.schedule.refreshes(self.batches))
        return CalibrationRequest(self.schedule.batches_per_window, self.batches) if due else None

    def calibrate(self, batches: Iterable[tuple[FeatureMaps, FeatureMaps]]) -> None:
        """Tracks the features, and assigns channels by them."""
        for student, teacher in batches:
            self.track(student, teacher)
        self.refresh()

    @torch.no_grad()
    def track(self, student: FeatureMaps, teacher: FeatureMaps) -> None:
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
            taps = ", ".join(map(str, self.pairs))
            raise AssignmentError(
                f"Channels of {taps} cannot be matched: no tracked batch had finite features in both networks; "
                "evaluate both as they start (--eval-only, --eval-teacher)."
            )
        for level, pair in enumerate(self.pairs):
            cost = self.statistics.cost(level)
            assignment, before = self._solve(cost, pair).to(cost.device), self.get_buffer(f"assignment{level}")
            distance = cost.gather(1, assignment).mean() / images
            old, new = (assigned_student(x, cost.shape[1]) for x in (before, assignment))
            moved = (new != old).float().mean()
            before.copy_(assignment)
            if pair.teacher.norm is None:
                self.get_buffer(f"margin{level}").copy_(self.statistics.mean_negative(level))
            logger.info(
                "Matched %s from %d images: mean distance %.3f, %.0f%% of the teacher's channels were reassigned",
                pair,
                images,
                distance.item(),
                100 * moved.item() if self.assigned else 100.0,
            )
        self._assigned = True

    def _solve(self, cost: Tensor, pair: TapPair) -> Tensor:
        assignment, error = self._unassigned(pair).to(cost.device), None
        if comm.is_main_process():
            try:
                mean = cost / self.statistics.images
                assignment.copy_(assign_channels(mean, assignment.shape[1], self._remainder, self.assignment_solver))
            except Exception as caught:  # raised when the others have been told, or they would wait forever
                error = caught
        if comm.get_world_size() > 1:
            dist.broadcast(assignment, src=0)
        if error is not None:
            raise error
        if bool((assignment < 0).any()):
            raise AssignmentError("The main process found no assignment of channels; its log says why.")
        return assignment

    @property
    def _remainder(self) -> str:
        # with one teacher channel each, shaving would leave most of the teacher out
        return "best" if self.reducer == "sm" else self.remainder

    def _unassigned(self, pair: TapPair) -> Tensor:
        students, teachers = pair.student.channels, pair.teacher.channels
        return torch.full((students, 1 if self.reducer == "sm" else teachers // students), -1)

    @property
    def fingerprint(self) -> str:
        """What an assignment belongs to: the teacher's weights, and the taps."""
        return " ".join([self._teacher, *(f"{pair.student.name}<-{pair.teacher.name}" for pair in self.pairs)])

    def get_extra_state(self) -> dict[str, Any]:
        """Returns the position in the schedule and in the random sequence, and which teacher this belongs to."""
        return {
            "iterations": self.batches / self.schedule.batches_per_iteration,
            "assigned": self.assigned,
            "random": self.random.state(),
            "fingerprint": self.fingerprint,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continues from a checkpoint; its iterations may have had another number of batches.

        Raises:
            AssignmentError: the assignment was made for another teacher.
        """
        if state["fingerprint"] != self.fingerprint:
            raise AssignmentError(
                "The channel assignment in the checkpoint was made for another teacher (DISTILL.TEACHER.WEIGHTS) or "
                "other taps (DISTILL.CHANNEL_MATCHING.TAPS)"
            )
        per_iteration, self._assigned = self.schedule.batches_per_iteration, bool(state["assigned"])
        # version 0.1 counted batches
        self.batches = round(state["iterations"] * per_iteration) if "iterations" in state else state["batches"]
        self.random.load_state(state["random"])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for level in range(len(self.pairs)):  # the buffers' names in version 0.1
            if f"{prefix}members{level}" in state_dict:
                state_dict[f"{prefix}assignment{level}"] = state_dict.pop(f"{prefix}members{level}")
        super()._load_from_state_dict(state_dict, prefix, *args)


def build_adapter(kind: str, channels: int) -> nn.Module:
    """Returns the norm between a student's map and the loss, by a value of ADAPTER."""
    if kind == "none":
        return nn.Identity()
    if kind == "gn":
        return nn.GroupNorm(math.gcd(32, channels), channels)
    return nn.BatchNorm2d(channels) if kind == "bn" else get_norm("naiveSyncBN", channels)


def assigned_student(assignment: Tensor, teacher_channels: int) -> Tensor:
    """Returns the student channel that each teacher channel is assigned to, (Ct,), -1 for none; from (Cs, k)."""
    students = assignment.new_full((teacher_channels,), -1)
    rows = torch.arange(len(assignment), device=assignment.device)[:, None].expand_as(assignment)
    taken = assignment >= 0
    students[assignment[taken]] = rows[taken]
    return students


def _margin(pair: TapPair) -> Tensor:
    if pair.teacher.norm is None:
        return torch.zeros(pair.teacher.channels)
    return norm_margin(pair.teacher.norm.weight, pair.teacher.norm.bias).float().cpu()


@config_check
def check_refreshes(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: the periods of the rule do not go with its steps.
    """
    node = cfg.DISTILL.CHANNEL_MATCHING
    MatchingSchedule(
        (), tuple(node.REFRESH_PERIODS), tuple(node.REFRESH_STEPS), images=node.TRACK_IMAGES, tracking=node.TRACKING
    )
