"""DistillTrainer: Detectron2's DefaultTrainer, with a teacher, exact resuming, and checkpoints that are the student."""

import contextlib
import logging
import os
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from d2kd.config import ConfigError
from d2kd.data.datasets import check_class_counts, check_datasets
from d2kd.data.loader import ResumableLoader, build_train_loader
from d2kd.evaluation.build import build_evaluator, folder_of
from d2kd.modeling import (
    DistilledModel,
    build_distilled_model,
    build_network,
    inherit_from_teacher,
    is_distillation,
)
from d2kd.modeling.random_state import untouched_random_state
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, create_ddp_model, hooks
from detectron2.engine.train_loop import HookBase, TrainerBase
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from .best import BestCheckpoint, EarlyStop
from .checkpoint import DistillCheckpointer, gather_process_states, load_process_state, share_buffers, write_weights
from .distill_printer import DistillPrinter
from .ema import EMAHook, WeightAverage
from .hooks import CheckpointHook, InterruptHook, ResultWriter, WallTime
from .matching_pass import MatchingPass
from .optimizer import build_optimizer
from .scaling import scale_to_processes
from .teacher_eval import evaluate_teacher
from .train_step import TrainStep
from .wandb_writer import WandbWriter, check_wandb

logger = logging.getLogger(__name__)

_PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class DistillTrainer(DefaultTrainer):
    """Trains the model of a configuration; with `DISTILL.TEACHER.CONFIG_FILE` set, by distillation.

    Attributes:
        student: the plain Detectron2 model that is trained, evaluated and saved.
        distilled: student, teacher and distillers, or None without a teacher.
        average: the moving average of the student (`SOLVER.EMA`), or None.
        stopped_early: whether `TEST.EARLY_STOP` has ended the training.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Raises:
            ValueError and its subclasses: whatever in configuration, data or teacher would fail later, before any
            training.
        """
        TrainerBase.__init__(self)
        check_datasets(cfg)
        check_class_counts(cfg)
        check_test_augmentation(cfg)
        check_wandb(cfg)
        cfg = scale_to_processes(cfg, comm.get_world_size())
        self.cfg = cfg
        model = self.build_model(cfg)
        self.distilled: DistilledModel | None = model if isinstance(model, DistilledModel) else None
        self.student: nn.Module = model.student if self.distilled is not None else model
        loader = self.build_train_loader(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self._trainer = TrainStep(
            create_ddp_model(model, broadcast_buffers=False),
            loader,
            optimizer,
            precision=_precision(cfg),
            accumulate=cfg.SOLVER.ACCUMULATE,
            before_raising=self._save_before_failure,
            running_model=self.running_model,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.average = _build_average(cfg, self.student)
        self.stopped_early = False
        self._process_states: list[dict[str, Any]] = []
        self._saved: tuple[str, int] = ("", -1)
        self.checkpointer = DistillCheckpointer(
            self.student,
            cfg.OUTPUT_DIR,
            trainer=weakref.proxy(self),
            distillers=None if self.distilled is None else self.distilled.distillers,
            balance=None if self.distilled is None else self.distilled.balance,
            ema=self.average,
            methods=None if self.distilled is None else cfg.DISTILL.METHODS,
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self._wall_time = WallTime()
        self._best = BestCheckpoint.from_config(cfg)
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The student, wrapped with its teacher and distillers where one is configured."""
        model = build_distilled_model(cfg) if is_distillation(cfg) else build_network(cfg, "--config-file")
        student = getattr(model, "student", model)
        role = "Model" if student is model else "Student"
        logger.info("%s: %s, %s parameters", role, type(student).__name__, f"{_size(model):,}")
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """See `d2kd.engine.optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> ResumableLoader:
        """See `d2kd.data.loader`."""
        return build_train_loader(cfg)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
        """See `d2kd.evaluation.build`."""
        return build_evaluator(cfg, dataset_name, output_folder)

    def build_hooks(self) -> list[HookBase | None]:
        """Timing, schedule, average, checkpoints, evaluation, best checkpoint, result and writers, in that order."""
        cfg = self.cfg
        ret: list[HookBase | None] = [
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            self._wall_time,
            MatchingPass(self.distilled) if MatchingPass.needed_by(self.distilled) else None,
            EMAHook(self.average) if self.average is not None else None,
            CheckpointHook(cfg.SOLVER.CHECKPOINT_PERIOD),
            InterruptHook(self._trainer),
        ]
        if cfg.DATASETS.TEST:
            ret.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self._evaluate))
            ret.append(self._best)
            if cfg.TEST.AUG.ENABLED:
                ret.append(hooks.CallbackHook(after_train=lambda _: self._evaluate_with_tta()))
        ret.append(ResultWriter(self.result_file, self._result))
        if comm.is_main_process():
            ret.append(hooks.PeriodicWriter(self.build_writers(), period=20))
        return ret

    def build_writers(self) -> list[EventWriter]:
        """Detectron2's writers, the methods' lines in the log, and with `WANDB.ENABLED` Weights & Biases."""
        writers = [*super().build_writers(), DistillPrinter()]
        if self.cfg.WANDB.ENABLED:
            writers.append(WandbWriter(self.cfg, resumed=lambda: self.start_iter > 0))
        return writers

    def resume_or_load(self, resume: bool = True) -> None:
        """Continues from the last checkpoint of the output directory if asked to and possible.

        Else loads `MODEL.WEIGHTS` into the student and lets it inherit from the teacher.
        """
        if resume and self.checkpointer.has_checkpoint():
            self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=True)
            self.start_iter = self.iter + 1
            self.data_loader.start = self.start_iter * self.cfg.SOLVER.ACCUMULATE
            logger.info(
                "Resumed from %s: next is iteration %d", self.checkpointer.get_checkpoint_file(), self.start_iter
            )
            return
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=False)
        if self.distilled is not None:
            inherit_from_teacher(self.cfg, self.distilled)
        if self.average is not None:
            self.average.restart()

    def train(self) -> Any:
        """Evaluates the teacher (`DISTILL.TEACHER.EVAL_FIRST`), then trains. Returns the last evaluation's results.

        A run that was interrupted between its last iteration and its result is evaluated only.
        """
        if self.start_iter >= self.max_iter or (self._best is not None and self._best.exhausted):
            logger.info("%d of %d iterations are done, and no more are to come.", self.start_iter, self.max_iter)
            if comm.all_gather(os.path.isfile(self.result_file))[0]:
                logger.info("Nothing to do: the result is in %s", self.result_file)
                return None
            self.stopped_early = self.start_iter < self.max_iter
            self.max_iter = self.start_iter
        if self.distilled is not None and self.cfg.DISTILL.TEACHER.EVAL_FIRST and self.start_iter == 0:
            with untouched_random_state(self._trainer.device):
                evaluate_teacher(self.cfg, self.distilled.teacher.model)
        with contextlib.suppress(EarlyStop):
            TrainerBase.train(self, self.start_iter, self.max_iter)
        results = getattr(self, "_last_eval_results", None)
        if results is not None and len(self.cfg.TEST.EXPECTED_RESULTS) and comm.is_main_process():
            verify_results(self.cfg, results)
        return results

    def save(self, name: str) -> None:
        """Writes `name`.pth and marks it as the last checkpoint. All processes must call it."""
        self._process_states = gather_process_states(self.running_model)
        if comm.is_main_process():
            self.checkpointer.save(name, iteration=self.iter, methods=self.checkpointer.methods)
            if name == "model_final" and self.average is not None:
                write_weights(os.path.join(self.cfg.OUTPUT_DIR, "model_final_ema.pth"), self.average.model)
        self._saved = name, self.iter
        comm.synchronize()

    def save_again(self) -> None:
        """Renews this iteration's checkpoint, if there is one, after an evaluation has changed the state."""
        name, iteration = self._saved
        if iteration == self.iter:
            self.save(name)

    def save_best(self, description: dict[str, Any]) -> None:
        """Writes the weights just evaluated as `model_best.pth`: the student's, or for a metric of it the average's."""
        averaged = self.average is not None and description["metric"].partition("/")[0].endswith("_EMA")
        if comm.is_main_process():
            path = os.path.join(self.cfg.OUTPUT_DIR, "model_best.pth")
            write_weights(path, self.average.model if averaged else self.student, best=description)

    @property
    def running_model(self) -> nn.Module:
        """The model whose running normalisers belong to the state of the run."""
        return self.student

    @property
    def result_file(self) -> str:
        """What a run writes last, when all is done."""
        return os.path.join(self.cfg.OUTPUT_DIR, "result.json")

    @property
    def finished(self) -> bool:
        """Whether the training has come to its end, early or not."""
        return self.stopped_early or self.iter >= self.max_iter

    def stop_early(self) -> None:
        """Ends the training here as if this were its last iteration; all processes must call it.

        Raises:
            EarlyStop: always; `train` catches it.
        """
        self.stopped_early = True
        self.save("model_final")
        raise EarlyStop

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs beside student and distillers."""
        state = super().state_dict()
        state["data_seed"] = self.data_loader.seed
        state["process_states"] = self._process_states
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`; random states are restored if there are as many processes as before."""
        super().load_state_dict(state_dict)
        self.data_loader.seed = state_dict["data_seed"]
        states = state_dict["process_states"]
        if len(states) == comm.get_world_size():
            load_process_state(self.running_model, states[comm.get_rank()])
        else:
            logger.warning(
                "The checkpoint was written by %d processes, now there are %d: training continues, but not bit by "
                "bit as it would have.",
                len(states),
                comm.get_world_size(),
            )

    def _save_before_failure(self) -> str:
        self.iter -= 1  # the state is that after the iteration before
        name = f"model_before_failure_{self.iter + 1:07d}"
        self.save(name)
        self.iter += 1
        path = os.path.join(self.cfg.OUTPUT_DIR, f"{name}.pth")
        return f" The state before this iteration is kept in {path}; --resume continues there."

    def _evaluate(self) -> dict[str, Any]:
        # evaluation draws random numbers (a loader's base seed); a run that is resumed after it must not notice
        with untouched_random_state(self._trainer.device):
            results = self._results_of_now()
        self._last_eval_results = results
        if self._best is not None:
            self._best.judge(results)
        return results

    def _results_of_now(self) -> dict[str, Any]:
        for model in [self.student] if self.average is None else [self.student, self.average.model]:
            share_buffers(model)
        results = dict(self.test(self.cfg, self.student))
        if self.average is not None:
            results.update(test_beside(type(self), self.cfg, self.average.model, "EMA"))
        return results

    def _evaluate_with_tta(self) -> None:
        if self.finished:
            results = self.test_with_tta(self.cfg, self.student)
            self._last_eval_results.update(results)
            self.storage.put_scalars(**flatten_results_dict(results), smoothing_hint=False)

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluates a GeneralizedRCNN with test-time augmentation (`TEST.AUG`); the results' names end in "_TTA".

        Raises:
            ConfigError: for other architectures.
        """
        check_test_augmentation(cfg)
        return test_beside(cls, cfg, GeneralizedRCNNWithTTA(cfg, model), "TTA")

    def _result(self) -> dict[str, Any]:
        cfg = self.cfg
        return {
            "metrics": getattr(self, "_last_eval_results", {}),
            "wall_time_s": round(self._wall_time.seconds, 2),
            "iterations": min(self.iter + 1, self.max_iter),
            "images_per_batch": cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.ACCUMULATE,
            "params": _size(self.student),
            "seed": self.data_loader.seed,
            "methods": list(cfg.DISTILL.METHODS) if self.distilled is not None else [],
            "best": None if self._best is None else self._best.describe(),
            "stopped_early": self.stopped_early,
        }


def check_test_augmentation(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: `TEST.AUG.ENABLED` is set for an architecture that has no test-time augmentation.
    """
    if cfg.TEST.AUG.ENABLED and cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
        raise ConfigError(
            f"TEST.AUG.ENABLED needs MODEL.META_ARCHITECTURE GeneralizedRCNN, not {cfg.MODEL.META_ARCHITECTURE}: "
            "set it False."
        )


def test_beside(trainer: type[DefaultTrainer], cfg: CfgNode, model: nn.Module, suffix: str) -> dict[str, Any]:
    """`trainer.test` of a variant of the student: results "<name>_<suffix>", predictions in `inference_<suffix>`."""
    logger.info("Evaluating the variant %s", suffix)
    folder = os.path.join(cfg.OUTPUT_DIR, f"inference_{suffix}")
    evaluators = [trainer.build_evaluator(cfg, name, folder_of(cfg, name, folder)) for name in cfg.DATASETS.TEST]
    return {f"{name}_{suffix}": value for name, value in trainer.test(cfg, model, evaluators).items()}


def _build_average(cfg: CfgNode, student: nn.Module) -> WeightAverage | None:
    node = cfg.SOLVER.EMA
    return WeightAverage(student, node.DECAY, node.WARMUP) if node.ENABLED else None


def _precision(cfg: CfgNode) -> torch.dtype | None:
    """The type of mixed precision, None for float32.

    Raises:
        ConfigError: unknown, or float16 on a CPU.
    """
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    name = cfg.SOLVER.AMP.PRECISION
    if name not in _PRECISIONS:
        raise ConfigError(f"SOLVER.AMP.PRECISION is {name!r}; it must be one of {', '.join(_PRECISIONS)}.")
    if name == "float16" and not cfg.MODEL.DEVICE.startswith("cuda"):
        raise ConfigError(
            f"SOLVER.AMP.PRECISION float16 needs CUDA, and MODEL.DEVICE is {cfg.MODEL.DEVICE!r}: set it to bfloat16."
        )
    return _PRECISIONS[name]


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in getattr(model, "student", model).parameters())
