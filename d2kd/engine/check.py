"""`--check`: all that a training does before its first step, and one step; nothing is written."""

import argparse
import contextlib
import logging
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2kd.config import with_values
from d2kd.distillers import Distiller
from d2kd.errors import ConfigError
from d2kd.modeling import BalanceError, DistilledModel, GradientBalance
from d2kd.modeling.architectures import architecture_of
from d2kd.modeling.feature_cache import require_folder
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from .check_report import report
from .hooks import calibrate
from .run_folder import FolderError, check_folder
from .setup import read_arguments, start_log

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

#: Steps behind the first one are timed until there are so many, or so many seconds have passed.
_TIMED_STEPS, _TIMED_SECONDS = 3, 10.0
#: Measurements of the gradients in float16, whose loss scale is halved after each that overflows.
_MEASUREMENTS = 16


@dataclass
class Level:
    """What one pair of taps was in the step."""

    method: str
    distiller: Distiller
    #: Number of the pair; None for a loss that no pair names.
    level: int | None
    tap: str
    student: tuple[int, ...] = ()
    teacher: tuple[int, ...] = ()
    #: None where the method has none of this pair, and only looks at it.
    loss: float | None = None
    #: Norm of its gradient over the sum of the norms of the task and of all levels, on what the backbone gives to the
    #: heads and on the taps in the backbone; None where nothing was measured.
    share: float | None = None


@dataclass
class Step:
    """What was seen in one step."""

    #: Heights and widths of the images, in pixels.
    images: list[tuple[int, int]] = field(default_factory=list)
    #: All losses by name, weighted.
    losses: dict[str, float] = field(default_factory=dict)
    levels: list[Level] = field(default_factory=list)
    #: The task's share of the gradient, see `Level`.
    task_share: float | None = None
    #: Trained parameters that the gradient has not reached.
    without_gradient: list[str] = field(default_factory=list)
    #: Seconds of a step, of those behind the first one.
    seconds: float = float("nan")
    #: Most memory that was in use, in bytes, and whose it is.
    memory: tuple[int, str] = (0, "")


def check_run(trainer_class: Any, args: argparse.Namespace) -> str:
    """Builds, loads and runs what a training would, prints what it is, and returns it.

    Args:
        trainer_class: a `DistillTrainer`.
        args: of the command.

    Raises:
        UserError: whatever a training with these arguments would raise until its first step.
    """
    if args.eval_only or args.eval_teacher:
        raise ConfigError("--check is for trainings; leave out --eval-only and --eval-teacher.")
    notices: list[str] = []
    cfg, lengths = read_arguments(args, notices)
    start_log(cfg, lengths, notices)
    if cfg.DISTILL.CACHE.DIR:  # nothing is written, there neither
        require_folder(cfg.DISTILL.CACHE.DIR)
        cfg = with_values(cfg, {"DISTILL.CACHE.DIR": ""})
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + comm.get_rank())
    checked = type(trainer_class.__name__, (trainer_class,), {"build_hooks": lambda self: []})  # writers write
    trainer = checked(cfg)
    trainer.resume_or_load(resume=args.resume)
    text = report(trainer, run_steps(trainer), _folder_note(cfg, args))
    if comm.is_main_process():
        print(text, flush=True)
    return text


def _folder_note(cfg: Any, args: argparse.Namespace) -> str:
    try:
        check_folder(cfg, args.resume, args.overwrite)
    except FolderError as error:
        return str(error)
    return ""


def run_steps(trainer: Any) -> Step:
    """Runs a step, and some more to time them; weights stay as they are, and nothing is saved if a step fails."""
    steps, distilled = trainer._trainer, trainer.distilled
    steps.before_raising = lambda: ""
    steps.accumulate = 1
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0
    trainer.iter = trainer.start_iter
    if distilled is not None:
        trainer.iter -= trainer.iter % distilled.every  # an iteration with the teacher
    seen = Step()
    with EventStorage(trainer.iter) as trainer.storage:
        if distilled is not None:
            for method, batches in calibrate(distilled, trainer.data_loader, at_most=1).items():
                logger.info("%s has looked at 1 batch; a training shows it %d.", method, batches)
        with _watching(trainer.network, distilled, seen):
            trainer.run_step()
        trained = [(n, p) for n, p in trainer.network.named_parameters() if p.requires_grad]
        seen.without_gradient = [name for name, parameter in trained if parameter.grad is None]
        times: list[float] = []
        while len(times) < _TIMED_STEPS and sum(times) < _TIMED_SECONDS:
            times.append(_timed_step(trainer))
            # all processes must make as many steps
            times = comm.all_gather(times)[0]
        seen.seconds = statistics.median(times)
    seen.memory = _peak_memory(steps.device)
    return seen


def _timed_step(trainer: Any) -> float:
    on_gpu = trainer._trainer.device.type == "cuda"
    start = time.perf_counter()
    trainer.run_step()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak_memory(device: torch.device) -> tuple[int, str]:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "of the GPU"
    whose = "of a process on the CPU, with all that it has loaded"
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count the process that started this one too
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return 1024 * int(line.split()[1]), whose
    if resource is None:
        return 0, "unknown on this system"
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, whose


@contextlib.contextmanager
def _watching(network: nn.Module, distilled: DistilledModel | None, seen: Step) -> Iterator[None]:
    """Notes into `seen` what passes through the network while the block runs."""

    def images_and_losses(_: nn.Module, inputs: Any, losses: Mapping[str, Tensor]) -> None:
        seen.images = [(int(x["image"].shape[-2]), int(x["image"].shape[-1])) for x in inputs[0]]
        seen.losses = {name: loss.detach().float().item() for name, loss in losses.items()}

    with contextlib.ExitStack() as stack:
        stack.callback(network.register_forward_hook(images_and_losses).remove)
        if distilled is not None and distilled.distillers:
            for method, distiller in distilled.distillers.items():
                assert isinstance(distiller, Distiller)
                stack.callback(distiller.register_forward_hook(_noting(method, distiller, seen)).remove)
            stack.callback(distilled.set_balance, distilled.balance)
            # methods whose taps lie in the heads pull at all that the backbone gives to these
            outputs = list(architecture_of(distilled.student).feature_shapes())
            balance = distilled.balance or GradientBalance(list(distilled.distillers))
            distilled.set_balance(_Measuring(balance, len(outputs), seen), outputs)
        yield
    for level in seen.levels:  # scaled, where there is a ratio to keep
        level.loss = seen.losses.get(f"distill/{level.method}/{level.tap}", level.loss)


def _noting(method: str, distiller: Distiller, seen: Step) -> Any:
    def note(_: nn.Module, inputs: Any, losses: Mapping[str, Tensor]) -> None:
        student, teacher, *_ = inputs
        for number, pair in enumerate(distiller.pairs):
            ours = tuple(student[pair.student.name].shape)
            theirs = tuple(distiller.teacher_feature(number, teacher).shape)
            seen.levels.append(Level(method, distiller, number, pair.name, ours, theirs))
        named = {pair.name for pair in distiller.pairs}
        seen.levels += [Level(method, distiller, None, tap) for tap in losses if tap not in named]

    return note


class _Measuring(GradientBalance):
    """Balances as another, and measures the gradient of every level on more features than that."""

    def __init__(self, balance: GradientBalance, more: int, seen: Step) -> None:
        """
        Args:
            balance: whose settings count.
            more: how many of the features, at the end, are there for the levels only.
            seen: takes the shares.
        """
        super().__init__(
            balance.methods,
            ratio=balance.ratio,
            limits=balance.limits,
            period=balance.period,
            log_period=balance.log_period,
        )
        self._more = more
        self._seen = seen

    def __call__(
        self,
        task: Mapping[str, Tensor],
        methods: Mapping[str, Mapping[str, Tensor]],
        features: Sequence[Tensor],
        factors: Mapping[str, float] | None = None,
    ) -> dict[str, dict[str, Tensor]]:
        """As in the base class."""
        scaled = super().__call__(task, methods, features[: len(features) - self._more], factors)
        features = list({id(feature): feature for feature in features}.values())
        names = [(method, key) for method in scaled for key in scaled[method]]
        given = factors or {}
        terms = [task, *({key: given.get(method, 1.0) * scaled[method][key]} for method, key in names)]
        for _ in range(_MEASUREMENTS):
            try:
                norms = self.measure(terms, features)
            except BalanceError:  # nothing that is tapped is trained
                return scaled
            if norms.isfinite().all():
                self._note(names, (norms / norms.sum()).tolist())
                break
        return scaled

    def _note(self, names: Sequence[tuple[str, str]], shares: Sequence[float]) -> None:
        self._seen.task_share, *others = shares
        by_name = dict(zip(names, others))
        for level in self._seen.levels:
            level.share = by_name.get((level.method, f"distill/{level.method}/{level.tap}"))
