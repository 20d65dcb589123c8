"""`DefaultTrainer`: everything that a config asks for, put together, each part replaceable."""

import logging
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from d2lite.checkpoint import DetectionCheckpointer
from d2lite.config import CfgNode
from d2lite.data import build_detection_test_loader, build_detection_train_loader
from d2lite.engine import hooks
from d2lite.engine.predictor import DefaultPredictor
from d2lite.engine.run_setup import (
    create_ddp_model,
    default_argument_parser,
    default_setup,
    default_writers,
)
from d2lite.engine.train_loop import AMPTrainer, HookBase, SimpleTrainer, TrainerBase
from d2lite.evaluation import (
    DatasetEvaluator,
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from d2lite.modeling import build_model
from d2lite.solver import LRScheduler, build_lr_scheduler, build_optimizer
from d2lite.utils import comm
from d2lite.utils.events import EventWriter
from d2lite.utils.logger import setup_logger

__all__ = ["DefaultPredictor", "DefaultTrainer", "create_ddp_model"]
__all__ += ["default_argument_parser", "default_setup", "default_writers"]

logger = logging.getLogger(__name__)


def _of_step(name: str, doc: str) -> property:
    """An attribute of the trainer that lies in its inner trainer, which runs the iterations."""
    return property(lambda outer: getattr(outer._trainer, name), lambda o, v: setattr(o._trainer, name, v), doc=doc)


class DefaultTrainer(TrainerBase):
    """Trains the model of a config with its data, optimizer, schedule, checkpoints and evaluations.

    Example::

        trainer = DefaultTrainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()

    Attributes:
        cfg: the config, scaled to the number of processes.
        checkpointer: saves the model, and this trainer's state under "trainer".
        scheduler: the learning-rate schedule.
        start_iter, max_iter: the iterations to run.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: the full config.
        """
        super().__init__()
        if not logging.getLogger("d2lite").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())

        self.cfg, self.start_iter, self.max_iter = cfg, 0, cfg.SOLVER.MAX_ITER
        self._trainer = self._build_step()
        self._trainer.register_hooks([_ForwardAfterBackward(self)])
        self.scheduler = self.build_lr_scheduler(cfg, self.optimizer)
        # A proxy: the checkpointer is an attribute of the trainer, and a cycle would keep both alive.
        self.checkpointer = DetectionCheckpointer(self.model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.register_hooks(self.build_hooks())

    def _build_step(self) -> SimpleTrainer:
        """Builds model, optimizer and data, and what runs one iteration with them."""
        cfg = self.cfg
        net = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, net)
        loader = self.build_train_loader(cfg)
        parts = (create_ddp_model(net, broadcast_buffers=False), loader, optimizer)
        if not cfg.SOLVER.AMP.ENABLED:
            return SimpleTrainer(*parts)
        # CPUs have fast kernels for bfloat16 only.
        precision = torch.bfloat16 if torch.device(cfg.MODEL.DEVICE).type == "cpu" else torch.float16
        return AMPTrainer(*parts, precision=precision)

    def resume_or_load(self, resume: bool = True) -> None:
        """Loads weights, and with `resume` the rest of the state.

        Args:
            resume: continue from the last checkpoint in `OUTPUT_DIR`; where there is none, and without
                `resume`, load `MODEL.WEIGHTS` and start at iteration 0.
        """
        checkpoints = self.checkpointer
        resuming = resume and checkpoints.has_checkpoint()
        checkpoints.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        # The checkpoint stores the last completed iteration.
        self.start_iter = self.iter + 1 if resuming else self.start_iter

    def build_hooks(self) -> list[HookBase | None]:
        """Returns the hooks: timing, schedule, precise batch norm, checkpoints, evaluation, writers."""
        cfg, files = self.cfg, comm.is_main_process()
        saving = hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD) if files else None
        testing = hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self._test_and_store_results)
        writing = hooks.PeriodicWriter(self.build_writers(), period=20) if files else None
        # Saved before the evaluation: if that fails, the checkpoint is there. Writers are last, for its results.
        steps = [hooks.IterationTimer(), hooks.LRScheduler(), self._precise_bn(), saving, testing, writing]
        return [hook for hook in steps if hook is not None]

    def _precise_bn(self) -> HookBase | None:
        options = self.cfg.TEST.PRECISE_BN
        if not options.ENABLED or not get_bn_modules(self.model):
            return None
        cfg = self.cfg.clone()
        cfg.defrost()
        # Rarely used, so worker processes would only occupy memory.
        cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 0])
        loader = self.build_train_loader(cfg)
        return hooks.PreciseBN(self.cfg.TEST.EVAL_PERIOD, self.model, loader, options.NUM_ITER)

    def _test_and_store_results(self) -> Mapping[str, Any]:
        results = self._last_eval_results = self.test(self.cfg, self.model)
        return results

    def build_writers(self) -> list[EventWriter]:
        """Returns the writers of the metrics: by default log, `metrics.json` and TensorBoard."""
        cfg = self.cfg
        return default_writers(cfg.OUTPUT_DIR, self.max_iter)

    def train(self) -> Mapping[str, Any] | None:
        """Trains.

        Returns:
            The last evaluation's results where `TEST.EXPECTED_RESULTS` are given, in the main process.
        """
        cfg = self.cfg
        super().train(self.start_iter, self.max_iter)
        if not cfg.TEST.EXPECTED_RESULTS or not comm.is_main_process():
            return None
        results = self._last_eval_results
        verify_results(cfg, results)
        return results

    def run_step(self) -> None:
        """Runs one iteration."""
        step = self._trainer
        step.iter = self.iter
        step.run_step()

    def after_train(self) -> None:
        """Writes what is left to write if the training is complete, then calls the hooks' `after_train`."""
        try:
            if self.iter >= self.max_iter and isinstance(self._trainer, SimpleTrainer):
                self._trainer.flush_metrics()
        finally:
            super().after_train()

    def state_dict(self) -> dict[str, Any]:
        """Returns iteration, hooks' states, and optimizer and loss scale under "_trainer"."""
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])

    model = _of_step("model", "The model, wrapped for several processes if there are several.")
    data_loader = _of_step("data_loader", "The training data.")
    optimizer = _of_step("optimizer", "The optimizer.")

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Builds the model and logs it."""
        model = build_model(cfg)
        logger.info("Model:\n%s", model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Builds the optimizer."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """Builds the learning-rate schedule."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[Any]:
        """Builds the training data loader."""
        return build_detection_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[Any]:
        """Builds the data loader of a test dataset."""
        return build_detection_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Builds the evaluator of a test dataset. Subclasses implement it, or pass some to `test`."""
        raise NotImplementedError(f"{cls.__name__} has no evaluator for '{dataset_name}': override build_evaluator.")

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: DatasetEvaluator | list[DatasetEvaluator] | None = None,
    ) -> Mapping[str, Any]:
        """Evaluates a model on `cfg.DATASETS.TEST`.

        Args:
            cfg: the config.
            model: the model.
            evaluators: one per dataset; None builds them by `build_evaluator`.

        Returns:
            Metrics by dataset, or just the metrics if there is one dataset. Empty for a dataset without
            evaluator, and in processes other than the main one.

        Raises:
            ValueError: if there are not as many evaluators as datasets.
        """
        names = cfg.DATASETS.TEST
        given = [evaluators] if isinstance(evaluators, DatasetEvaluator) else evaluators
        if given is not None and len(given) != len(names):
            raise ValueError(f"There are {len(names)} test datasets, but {len(given)} evaluators.")
        pairs = zip(names, given or [None] * len(names))
        results = OrderedDict((name, cls._test_on(cfg, model, name, evaluator)) for name, evaluator in pairs)
        return next(iter(results.values())) if len(results) == 1 else results

    @classmethod
    def _test_on(
        cls, cfg: CfgNode, model: nn.Module, name: str, evaluator: DatasetEvaluator | None
    ) -> Mapping[str, Any]:
        if evaluator is None:
            try:
                evaluator = cls.build_evaluator(cfg, name)
            except NotImplementedError as error:
                logger.warning("No evaluation on %s: %s", name, error)
                return {}
        results = inference_on_dataset(model, cls.build_test_loader(cfg, name), evaluator)
        if comm.is_main_process():
            if not isinstance(results, dict):
                raise TypeError(f"The evaluator of {name} must return a dict, got {type(results).__name__}.")
            logger.info("Evaluation results for %s in csv format:", name)
            print_csv_format(results)
        return results

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """Fits a config that was made for `SOLVER.REFERENCE_WORLD_SIZE` processes to another number.

        Batch size and learning rate grow with the number of processes, the lengths in iterations shrink
        (Goyal et al., "Accurate, Large Minibatch SGD", arXiv 1706.02677, section 2.1).

        Args:
            cfg: the config; not changed.
            num_workers: number of processes.

        Returns:
            A scaled copy; the config itself if its reference is 0 or the same number.

        Raises:
            ValueError: if the batch size cannot be divided among the reference's processes.
        """
        old = cfg.SOLVER.REFERENCE_WORLD_SIZE
        if old in (0, num_workers):
            return cfg
        if cfg.SOLVER.IMS_PER_BATCH % old != 0:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} cannot be divided by "
                f"SOLVER.REFERENCE_WORLD_SIZE {old}."
            )
        frozen = cfg.is_frozen()
        cfg = cfg.clone()
        cfg.defrost()
        scale = num_workers / old
        solver = cfg.SOLVER
        solver.IMS_PER_BATCH = round(solver.IMS_PER_BATCH * scale)
        solver.BASE_LR *= scale
        solver.MAX_ITER = round(solver.MAX_ITER / scale)
        solver.WARMUP_ITERS = round(solver.WARMUP_ITERS / scale)
        solver.STEPS = tuple(round(step / scale) for step in solver.STEPS)
        solver.CHECKPOINT_PERIOD = round(solver.CHECKPOINT_PERIOD / scale)
        cfg.TEST.EVAL_PERIOD = round(cfg.TEST.EVAL_PERIOD / scale)
        solver.REFERENCE_WORLD_SIZE = num_workers
        logger.info(
            "Scaled the config to %d processes: batch_size=%d, learning_rate=%g, max_iter=%d, warmup=%d.",
            num_workers,
            solver.IMS_PER_BATCH,
            solver.BASE_LR,
            solver.MAX_ITER,
            solver.WARMUP_ITERS,
        )
        if frozen:
            cfg.freeze()
        return cfg


class _ForwardAfterBackward(HookBase):
    """Forwards `after_backward` of the inner trainer, which runs the backward pass, to the hooks of the outer one."""

    def __init__(self, outer: TrainerBase) -> None:
        self._outer = weakref.proxy(outer)

    def after_backward(self) -> None:
        self._outer.after_backward()
