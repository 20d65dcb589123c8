"""ResumableTrainer: the training loop with exact resuming, for any model."""

import inspect
import logging
import os
import re
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from d2kd.config import with_values
from d2kd.data.loader import ResumableLoader, build_train_loader
from d2kd.errors import UserError
from detectron2.config import CfgNode
from detectron2.engine import create_ddp_model, default_writers, hooks
from detectron2.engine.train_loop import HookBase, TrainerBase
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter

from .checkpoint import DistillCheckpointer, gather_process_states, load_process_state
from .epochs import with_iterations
from .hooks import CheckpointHook, InterruptHook, ProgressWriter, WallTime
from .optimizer import build_optimizer
from .run_files import forget_replaced_run
from .run_folder import DISK_ERRORS
from .run_settings import run_settings, write_config
from .scaling import scale_to_processes
from .schedule import build_lr_scheduler
from .train_step import ADVICE, NonFiniteLossError, TrainStep, mixed_precision

logger = logging.getLogger(__name__)


#: A loss this many times the usual one, of which a quarter of all are below, is no noise.
_EXPLOSION = 10.0
#: PyTorch's word for whether buffers are broadcast in every step; the second one is that of versions before 2.14.
_BROADCASTS_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


def _of_step(name: str) -> Any:
    """An attribute of the trainer that lies in its steps, as in Detectron2's `DefaultTrainer`."""
    return property(
        lambda trainer: getattr(trainer._trainer, name), lambda trainer, value: setattr(trainer._trainer, name, value)
    )


class ResumableTrainer(TrainerBase):
    """Trains a model and saves checkpoints from which a run continues bit by bit.

    It offers what users of Detectron2's `DefaultTrainer` rely on: the `build_*` methods to override, `build_hooks`,
    `resume_or_load`, `train`, `test`, `model`, `optimizer`, `data_loader`, `scheduler`, `checkpointer`. A subclass says
    what is built (`build_model`), saved (`build_checkpointer`) and run between the steps (`extra_hooks`).
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: the whole configuration.

        Raises:
            UserError: whatever in configuration, data or model would fail later, before any training.
        """
        super().__init__()
        self.check_config(cfg)
        cfg = self.auto_scale_workers(with_iterations(cfg), comm.get_world_size())
        self.network = self.build_model(cfg)
        self.cfg = cfg = self.settle(cfg)
        loader = self.build_train_loader(cfg)
        optimizer = self.build_optimizer(cfg, self.network)
        self._trainer = TrainStep(
            wrap_data_parallel(self.network),
            loader,
            optimizer,
            precision=mixed_precision(cfg),
            accumulate=cfg.SOLVER.ACCUMULATE,
            before_raising=self._before_failure,
            detector=self.detector,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        #: options of the optimizer's groups as configured: those in a checkpoint may be of another configuration
        self._configured = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        if not (hasattr(loader, "seed") and hasattr(loader, "start")):
            logger.warning(
                "The training loader, a %s, cannot be set to a position, as those of d2kd.data.loader can: after "
                "--resume the images come in another order.",
                type(loader).__name__,
            )
        self._process_states: list[dict[str, Any]] = []
        self._saved: tuple[str, int] = ("", -1)
        self._progress: ProgressWriter | None = None
        self.build_parts()
        self.checkpointer = self.build_checkpointer()
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.wall_time = WallTime()
        self.register_hooks(self.build_hooks())

    # ---- what a subclass decides ----

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """Raises UserError for what would fail later."""

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Returns the module that the steps train: its forward pass gives a dict of losses."""
        raise NotImplementedError

    def settle(self, cfg: CfgNode) -> CfgNode:
        """Returns the configuration with what building the model has decided; all that follows is built by it."""
        return cfg

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """Returns the optimizer, see `d2kd.engine.optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
        """Returns the schedule of the learning rate, see `d2kd.engine.schedule`."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> ResumableLoader:
        """Returns the training loader, see `d2kd.data.loader`."""
        return build_train_loader(cfg)

    def build_parts(self) -> None:
        """Makes what checkpointer and hooks need beside model, optimizer and loader."""

    def build_checkpointer(self) -> DistillCheckpointer:
        """Returns what saves and loads the run."""
        return DistillCheckpointer(
            self.network, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self), settings=self.settings()
        )

    def settings(self) -> dict[str, Any]:
        """Returns what a checkpoint says of the run, to be compared when it is resumed."""
        records = getattr(self.data_loader, "records", None)
        return run_settings(self.cfg, None if records is None else len(records))

    def build_hooks(self) -> list[HookBase | None]:
        """Returns the hooks in the order of their calls: timing, schedule, `extra_hooks`, writers."""
        self._progress = ProgressWriter(self.build_writers(), period=20) if comm.is_main_process() else None
        return [hooks.IterationTimer(), hooks.LRScheduler(), self.wall_time, *self.extra_hooks(), self._progress]

    def extra_hooks(self) -> list[HookBase | None]:
        """Returns the hooks between schedule and writers: checkpoints and interruption here."""
        return [CheckpointHook(self.cfg.SOLVER.CHECKPOINT_PERIOD), InterruptHook(self._trainer)]

    def build_writers(self) -> list[EventWriter]:
        """Returns Detectron2's writers: log, metrics.json and TensorBoard."""
        return default_writers(self.cfg.OUTPUT_DIR, self.max_iter)

    @property
    def detector(self) -> nn.Module:
        """The detector whose running loss normalizers belong to the state of the run."""
        return self.network

    @property
    def result_file(self) -> str:
        """What a run writes last, when all is done."""
        return os.path.join(self.cfg.OUTPUT_DIR, "result.json")

    auto_scale_workers = staticmethod(scale_to_processes)

    # ---- the loop ----

    #: What the steps call: the network, maybe wrapped for data parallelism.
    model = _of_step("model")
    optimizer = _of_step("optimizer")
    data_loader = _of_step("data_loader")

    def train(self) -> Any:
        """Runs the iterations from `start_iter` to `max_iter` with their hooks, as Detectron2's loop does.

        A `UserError` passes without its traceback in the log: its message says all.
        """
        first, end = self.start_iter, self.max_iter
        logger.info("Starting training from iteration %d", first)
        self.iter = first
        with EventStorage(first) as self.storage:
            try:
                self.before_train()
                for self.iter in range(first, end):
                    self.before_step()
                    self.run_step()
                    self.after_step()
                # hooks tell by it whether the training came to its end
                self.iter = max(first, end)
            except UserError:
                raise
            except KeyboardInterrupt:
                logger.warning("Training was interrupted at iteration %d.", self.iter)
                raise
            except OSError as error:
                if error.errno not in DISK_ERRORS:
                    logger.exception("Exception during training, at iteration %d:", self.iter)
                raise
            except Exception:
                logger.exception("Exception during training, at iteration %d:", self.iter)
                raise
            finally:
                self.after_train()

    def before_train(self) -> None:
        """Writes the configuration that is in force, and calls the hooks."""
        if comm.is_main_process():
            write_config(self.cfg)
        super().before_train()

    def run_step(self) -> None:
        """Runs one iteration."""
        self._trainer.iter = self.iter
        self._trainer.run_step()

    def after_step(self) -> None:
        """Calls the hooks; after the first iteration nothing of the run that this one replaces is kept any more."""
        super().after_step()
        if self.iter == self.start_iter and comm.is_main_process():
            forget_replaced_run(self.cfg.OUTPUT_DIR)

    @property
    def finished(self) -> bool:
        """Whether the training has come to its end."""
        return self.iter >= self.max_iter

    # ---- saving and resuming ----

    def resume(self) -> bool:
        """Continues from the last checkpoint of the output directory; returns whether there was one."""
        if not self.checkpointer.has_checkpoint():
            return False
        self.checkpointer.resume_or_load("", resume=True)
        self.cfg = with_values(self.cfg, self.checkpointer.in_force)
        self.start_iter = self.iter + 1
        self._saved = Path(self.checkpointer.get_checkpoint_file()).stem, self.iter
        self._use_configured_schedule()
        if hasattr(self.data_loader, "start"):
            self.data_loader.start = self.start_iter * self.cfg.SOLVER.ACCUMULATE
        logger.info("Resumed from %s: next is iteration %d", self.checkpointer.get_checkpoint_file(), self.start_iter)
        return True

    def save(self, name: str, tag: bool = True) -> None:
        """Writes `name`.pth and marks it as the last checkpoint. All processes must call it.

        Raises:
            NonFiniteLossError: weights are infinite or NaN; the last checkpoint stays what it was.
        """
        self._require_finite_weights()
        self._process_states = gather_process_states(self.detector)
        if comm.is_main_process():
            self.checkpointer.save(name, tag=tag, iteration=self.iter)
            self.save_more(name)
        self._saved = name, self.iter
        comm.synchronize()

    def save_more(self, name: str) -> None:
        """Writes what stands beside a checkpoint; on the main process."""

    def save_again(self) -> None:
        """Renews this iteration's checkpoint, if there is one, after an evaluation has changed the state.

        Its metrics are in the files by then: a run that is resumed behind an evaluation does not make it again.
        """
        if self._progress is not None:
            self._progress.write_files()
        name, iteration = self._saved
        if iteration == self.iter:
            self.save(name)

    def state_dict(self) -> dict[str, Any]:
        """Returns all that resuming needs beside what the checkpointer saves itself."""
        state = super().state_dict()
        state["_trainer"] = self._trainer.state_dict()
        state["data_seed"] = getattr(self.data_loader, "seed", None)
        state["process_states"] = self._process_states
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what `state_dict` has returned; random states if there are as many processes as before."""
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])
        if hasattr(self.data_loader, "seed") and state_dict["data_seed"] is not None:
            self.data_loader.seed = state_dict["data_seed"]
        states = state_dict["process_states"]
        if len(states) == comm.get_world_size():
            load_process_state(self.detector, states[comm.get_rank()])
        else:
            logger.warning(
                "The checkpoint was written by %d processes, now there are %d: training continues, but not bit by "
                "bit as it would have.",
                len(states),
                comm.get_world_size(),
            )

    def _use_configured_schedule(self) -> None:
        """Lets the configuration decide on learning rate, momentum and weight decay, not the optimizer's state."""
        if not isinstance(self.scheduler, LRMultiplier):  # one of one's own keeps its state
            return
        for group, configured in zip(self.optimizer.param_groups, self._configured):
            group.update(configured)
        self.scheduler.base_lrs = [group["initial_lr"] for group in self._configured]
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_lr()):
            group["lr"] = rate

    def _require_finite_weights(self) -> None:
        ours = self.checkpointer.checkpointables.get("ema")
        states = [self.network.state_dict(), *([] if ours is None else [ours.model.state_dict()])]
        named = [(n, t) for s in states for n, t in s.items() if isinstance(t, Tensor) and t.is_floating_point()]
        finite = torch.stack([t.isfinite().all() for _, t in named]).tolist() if named else []
        bad = [name for (name, _), is_finite in zip(named, finite) if not is_finite]
        bad = next((names for names in comm.all_gather(bad) if names), [])
        if bad:
            self._tag_sound_checkpoint()
            raise NonFiniteLossError(
                f"Not finite after iteration {self.iter}: {len(bad)} weights, first {bad[0]}. They are not saved. "
                f"{ADVICE} {self._how_to_go_on()}"
            )

    def _before_failure(self) -> str:
        """Keeps the state before an iteration that fails, and says how to go on."""
        self.iter -= 1  # the state is that after the iteration before
        name = f"model_before_failure_{self.iter + 1:07d}"
        try:
            self.save(name, tag=False)
            kept = f"The state before it is kept in {os.path.join(self.cfg.OUTPUT_DIR, name)}.pth."
        except NonFiniteLossError:
            kept = "The weights were ruined before it."
        self.iter += 1
        self._tag_sound_checkpoint()
        return f" {kept} {self._how_to_go_on()}"

    def _tag_sound_checkpoint(self) -> None:
        """Lets a resumed run continue from the last checkpoint before the loss began to grow without end."""
        if not comm.is_main_process():
            return
        history = self.storage.histories().get("total_loss")
        losses = history.values() if history is not None else []
        usual = float(np.quantile([loss for loss, _ in losses], 0.25, method="lower")) if losses else 0.0
        # a run that fails at once has been resumed from ruined weights
        none_yet = self.iter - (self.iter == self.start_iter)
        sound = max((int(i) for loss, i in losses if loss <= _EXPLOSION * usual), default=none_yet)
        folder = Path(self.cfg.OUTPUT_DIR)
        matches = [re.fullmatch(r"model_(\d+)\.pth", path.name) for path in folder.glob("model_*.pth")]
        numbers = {int(match[1]): match[0] for match in matches if match}
        # the loss of an iteration tells of the weights that the one before has left
        earlier = [number for number in numbers if number < sound]
        if earlier:
            self.checkpointer.tag_last_checkpoint(numbers[max(earlier)])
        elif self.checkpointer.has_checkpoint() and self._saved[1] >= sound:
            (folder / "last_checkpoint").unlink()
            for name in numbers.values():  # a resumed run starts anew
                (folder / name).rename(folder / f"unsound_{name}")

    def _how_to_go_on(self) -> str:
        if self.checkpointer.has_checkpoint():
            last = Path(self.checkpointer.get_checkpoint_file()).name
            return f"--resume (in Python resume=True) continues from {last}, with what you change."
        return "No checkpoint lies before it: --resume (in Python resume=True) starts anew, with what you change."


def wrap_data_parallel(model: nn.Module) -> nn.Module:
    """Returns a model that averages its gradients over the processes; the model itself in a single process.

    Buffers are not broadcast: batch statistics belong to a process until they are saved or evaluated.
    """
    # Detectron2 names a GPU unless told otherwise, which modules on the CPU do not take
    on_cpu = {} if next(model.parameters()).is_cuda else {"device_ids": None}
    return create_ddp_model(model, **{_BROADCASTS_BUFFERS: False}, **on_cpu)
