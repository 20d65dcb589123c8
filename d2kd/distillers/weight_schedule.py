"""Schedules of a method's weight over the training: warm-up, decay to a floor, and an end."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from d2kd.config import config_check, declare_keys, get_key
from d2kd.errors import ConfigError
from d2kd.settings import Configurable, Setting, setting
from detectron2.config import CfgNode

NODE = "DISTILL.SCHEDULE"
SHAPES = ("constant", "linear", "cosine")
SHARED = "shared"


class WeightSchedule(Configurable):
    """The factor on the losses of a method, in [0, 1]: a function of the iteration alone, so that runs resume exactly.

    It rises linearly to 1 in the warm-up, (t + 1) / WARMUP_ITERS at iteration t. Between START_ITER and END_ITER, with
    x from 0 to 1, it falls to the floor f: 1 - (1 - f) x, or f + (1 - f) (1 + cos(pi x)) / 2. From STOP_ITER on it is
    0.

    Example:
        >>> schedule = WeightSchedule(max_iter=1000, shape="cosine", floor=0.1, warmup_iters=100)
        >>> schedule.factor(0), schedule.factor(99), schedule.factor(550), schedule.factor(1000)
        (0.01, 1.0, 0.55, 0.1)
    """

    shape: str = setting(
        "constant",
        "How the weight of a method falls over the training: constant | linear | cosine, to FLOOR times the weight.",
        choices=SHAPES,
    )
    floor: float = setting(
        0.0, "Share of the weight that is left at END_ITER, for linear and cosine.", at_least=0, below=1
    )
    warmup_iters: int = setting(
        0, "Iterations in which the weight rises linearly to its full value.", at_least=0, iterations=True
    )
    start_iter: int = setting(
        0, "Iteration at which the decay starts; 0 = when the warm-up is over.", at_least=0, iterations=True
    )
    end_iter: int = setting(
        0, "Iteration from which on the weight is at the floor; 0 = SOLVER.MAX_ITER.", at_least=0, iterations=True
    )
    stop_iter: int = setting(
        0,
        "Iteration from which on the weight is 0; 0 = never. When all methods have come to weight 0 for good, the "
        "teacher no longer runs.",
        at_least=0,
        iterations=True,
    )

    def __init__(self, *, max_iter: int, where: str = NODE, **settings: Any) -> None:
        """
        Args:
            max_iter: length of the training in iterations; 0 where that is not known yet, and a decay to the end has
                no value yet.
            where: the YAML node, for messages.
            settings: by name; the class declares them with their defaults.

        Raises:
            ConfigError: a setting is out of range, or the schedule contradicts itself or the length.
        """
        self.configure(settings, where)
        self.where = where
        self.first = max(self.start_iter, self.warmup_iters)
        self.last = self.end_iter or max_iter
        self._check(where, max_iter)

    def _check(self, where: str, max_iter: int) -> None:
        if self.shape == "constant":
            for name in ("floor", "start_iter", "end_iter"):
                declared = self.SETTINGS[name]
                if getattr(self, name) != declared.default:
                    raise ConfigError(
                        f"{where}.{declared.key} is {getattr(self, name)}, which has no effect with SHAPE constant: "
                        "set SHAPE to linear or cosine."
                    )
        elif self.last and self.last < self.first:
            end = f"END_ITER is {self.end_iter}" if self.end_iter else f"END_ITER is 0, SOLVER.MAX_ITER {max_iter}"
            raise ConfigError(
                f"{where}.{end}: the decay would end before it starts, at iteration {self.first} (START_ITER "
                f"{self.start_iter}, WARMUP_ITERS {self.warmup_iters})."
            )
        elif max_iter and self.first >= max_iter:
            raise ConfigError(
                f"{where}: the decay would start at iteration {self.first} (START_ITER {self.start_iter}, WARMUP_ITERS "
                f"{self.warmup_iters}), and the training has {max_iter} iterations (SOLVER.MAX_ITER)."
            )
        if max_iter and self.warmup_iters > max_iter:
            raise ConfigError(
                f"{where}.WARMUP_ITERS is {self.warmup_iters}, and the training has {max_iter} iterations "
                "(SOLVER.MAX_ITER): the weight would never rise to its value."
            )
        if not self.stop_iter:
            return
        if max_iter and self.stop_iter >= max_iter:
            raise ConfigError(
                f"{where}.STOP_ITER is {self.stop_iter}, which comes after the last iteration (SOLVER.MAX_ITER is "
                f"{max_iter}): 0 is never."
            )
        if self.stop_iter <= self.first and self.first:
            raise ConfigError(
                f"{where}.STOP_ITER is {self.stop_iter}: the schedule would end before it starts, at iteration "
                f"{self.first} (START_ITER {self.start_iter}, WARMUP_ITERS {self.warmup_iters})."
            )

    def factor(self, iteration: int) -> float:
        """Returns the factor on the losses at an iteration, counted from 0.

        Raises:
            ConfigError: it decays to the end of a training whose length in iterations is not known.
        """
        if self.is_over(iteration):
            return 0.0
        if iteration < self.warmup_iters:
            return (iteration + 1) / self.warmup_iters
        if self.shape == "constant" or iteration < self.first:
            return 1.0
        if iteration >= self.last:
            return self.floor
        x = (iteration - self.first) / (self.last - self.first)
        if self.shape == "linear":
            return 1.0 - (1.0 - self.floor) * x
        return self.floor + (1.0 - self.floor) * (1.0 + math.cos(math.pi * x)) / 2.0

    def is_over(self, iteration: int) -> bool:
        """Returns whether the factor is 0 at an iteration and at all later ones."""
        stopped = 0 < self.stop_iter <= iteration
        if stopped or self.shape == "constant":
            return stopped
        if not self.last:
            raise ConfigError(
                f"{self.where} ends with the training, whose length is given in epochs (SOLVER.MAX_EPOCHS) and has not "
                "been counted in iterations: take the configuration from `d2kd.load_config`, or set SOLVER.MAX_ITER."
            )
        return self.floor == 0 and iteration >= self.last

    @property
    def always_one(self) -> bool:
        """Whether there is no schedule: the factor is always 1."""
        return self.shape == "constant" and not self.warmup_iters and not self.stop_iter

    def __str__(self) -> str:
        words = [f"rises over {self.warmup_iters} iterations"] if self.warmup_iters else []
        if self.shape != "constant":
            words.append(f"falls ({self.shape}) to {self.floor:g} of it from iteration {self.first} to {self.last}")
        words += [f"is 0 from iteration {self.stop_iter} on"] if self.stop_iter else []
        return ", ".join(words) or "stays as it is"


class MethodSchedule(WeightSchedule):
    """The node of one method: `DISTILL.SCHEDULE`, or in its place a schedule of the method's own."""

    shape: str = setting(
        SHARED,
        f"shared: all of {NODE} | else this schedule in its place: constant | linear | cosine.",
        choices=(SHARED, *SHAPES),
    )
    NAME: ClassVar[str] = "SCHEDULE"


declare_keys(NODE, **{declared.key: declared for declared in WeightSchedule.SETTINGS.values()})


def weight_schedule(cfg: CfgNode, node: str) -> WeightSchedule:
    """Returns the schedule of the method with a node, e.g. "FEATURE_MIMIC".

    Raises:
        ConfigError: it contradicts itself or the length of the training.
    """
    own = cfg.DISTILL[node].get(MethodSchedule.NAME, {"SHAPE": SHARED})
    where = f"DISTILL.{node}.{MethodSchedule.NAME}"
    if own["SHAPE"] != SHARED:
        return _schedule(cfg, own, where, MethodSchedule.SETTINGS)
    for declared in MethodSchedule.SETTINGS.values():
        value = own.get(declared.key, declared.default)
        if value != declared.default:
            raise ConfigError(
                f"{where}.{declared.key} is {value}, which has no effect with SHAPE {SHARED}, that is {NODE}: set "
                f"{where}.SHAPE to {', '.join(SHAPES)}."
            )
    return _schedule(cfg, cfg.DISTILL.SCHEDULE, NODE, WeightSchedule.SETTINGS)


def _schedule(cfg: CfgNode, node: CfgNode, where: str, settings: Mapping[str, Setting]) -> WeightSchedule:
    # given in epochs, the length in iterations is not known before the data are
    max_iter = 0 if get_key(cfg, "SOLVER.MAX_EPOCHS", 0) > 0 else int(cfg.SOLVER.MAX_ITER)
    return WeightSchedule(max_iter=max_iter, where=where, **{name: node[s.key] for name, s in settings.items()})


def weight_schedules(cfg: CfgNode, nodes: Mapping[str, str]) -> dict[str, WeightSchedule]:
    """Returns the schedules of methods by their names, given their nodes."""
    return {method: weight_schedule(cfg, node) for method, node in nodes.items()}


def scale_schedules(cfg: CfgNode, nodes: Sequence[str], factor: float) -> None:
    """Scales all schedules to `factor` times the iterations; `SOLVER.MAX_ITER` is scaled already."""
    for node in [cfg.DISTILL.SCHEDULE, *(cfg.DISTILL[name].get(MethodSchedule.NAME, {}) for name in nodes)]:
        for declared in WeightSchedule.SETTINGS.values():
            if not declared.iterations or declared.key not in node:
                continue
            before = node[declared.key]
            node[declared.key] = max(declared.scaled(before, factor), min(before, 1))  # 0 would be another thing
        if "SHAPE" in node and not cfg.SOLVER.MAX_EPOCHS:
            _keep_order(node, cfg.SOLVER.MAX_ITER)


def _keep_order(node: CfgNode, max_iter: int) -> None:
    """Undoes what rounding has moved behind the end of the training, or of the schedule."""
    for key in ("WARMUP_ITERS", "START_ITER"):
        node[key] = min(node[key], max(max_iter - 2, 0))
    first = max(node["WARMUP_ITERS"], node["START_ITER"])
    if node["END_ITER"]:
        node["END_ITER"] = max(node["END_ITER"], first)
    if node["STOP_ITER"]:
        node["STOP_ITER"] = max(min(node["STOP_ITER"], max_iter - 1), first + 1)


@config_check
def check_shared_schedule(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: `DISTILL.SCHEDULE` contradicts itself or the length of the training.
    """
    _schedule(cfg, cfg.DISTILL.SCHEDULE, NODE, WeightSchedule.SETTINGS)
