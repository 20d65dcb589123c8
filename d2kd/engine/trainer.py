"""DistillTrainer: trains a Detectron2 model, with a teacher where one is configured, and evaluates it."""

import contextlib
import inspect
import logging
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from d2kd.config import with_values
from d2kd.data.classes import check_classes, class_names, share_class_names
from d2kd.data.datasets import check_datasets
from d2kd.data.loader import build_test_loader
from d2kd.evaluation.build import build_evaluator, check_evaluators
from d2kd.modeling import (
    DistilledModel,
    Teacher,
    TeacherError,
    build_distilled_model,
    build_network,
    is_distillation,
)
from d2kd.modeling.architectures import check_test_augmentation
from d2kd.rng import preserve_rng_state
from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.engine.train_loop import HookBase
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from .checkpoint import DistillCheckpointer, load_start, write_weights
from .ema import EMAHook, build_ema
from .evaluation import StudentEvaluation, evaluate, evaluate_teacher, evaluate_with_tta
from .feature_cache import connect_cache, tell_of_cache
from .hooks import (
    BestCheckpoint,
    CalibrationHook,
    CheckpointHook,
    EarlyStop,
    EvaluationHook,
    InterruptHook,
    ResultWriter,
    TeacherTime,
    build_masking_pictures,
)
from .resumable_trainer import ResumableTrainer
from .writers import DistillPrinter, WandbWriter, check_wandb

logger = logging.getLogger(__name__)


class DistillTrainer(ResumableTrainer):
    """Trains the model of a configuration; with `DISTILL.TEACHER.CONFIG_FILE` set, by distillation.

    Attributes:
        student: the plain Detectron2 model that is trained, evaluated and saved.
        distilled: student, teacher and distillers, or None without a teacher.
        ema: the exponential moving average of the student (`SOLVER.EMA`), or None.
        evaluation: evaluates the student; keeps the last results.
        best: keeps the best checkpoint (`TEST.BEST_CHECKPOINT`) and ends the training early, or None.
        stopped_early: whether `TEST.EARLY_STOP` has ended the training.
    """

    @classmethod
    def check_config(cls, cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "TEST")) -> None:
        """Raises UserError for what would fail later, in configuration or in the datasets of some splits."""
        check_datasets(cfg, splits)
        check_classes(cfg, splits)
        share_class_names(cfg, splits)
        own, ours = (inspect.getattr_static(trainer, "build_evaluator") for trainer in (cls, DistillTrainer))
        if own is ours:
            check_evaluators(cfg)  # one of one's own knows other types
        check_test_augmentation(cfg)
        check_wandb(cfg)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Returns the student, wrapped with its teacher and distillers where one is configured."""
        model = build_distilled_model(cfg) if is_distillation(cfg) else build_network(cfg, "--config-file")
        student = getattr(model, "student", model)
        role = "Model" if student is model else "Student"
        logger.info("%s: %s, %s parameters", role, type(student).__name__, f"{_num_parameters(student):,}")
        return model

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[Any]:
        """Returns the loader of a test set, see `d2kd.data.loader`."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
        """Returns the evaluator of a test set, see `d2kd.evaluation.build`."""
        return build_evaluator(cfg, dataset_name, output_folder)

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: DatasetEvaluator | list[DatasetEvaluator] | None = None
    ) -> Mapping[str, Any]:
        """Evaluates a model on `DATASETS.TEST`, see `d2kd.engine.evaluation`."""
        return evaluate(cls, cfg, model, evaluators)

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluates with test-time augmentation (`TEST.AUG`); the results' names end in "_TTA"."""
        return evaluate_with_tta(cls, cfg, model)

    @property
    def distilled(self) -> DistilledModel | None:
        """Student, teacher and distillers; None without a teacher."""
        return self.network if isinstance(self.network, DistilledModel) else None

    @property
    def student(self) -> nn.Module:
        """The plain Detectron2 model."""
        return self.network if self.distilled is None else self.distilled.student

    @property
    def detector(self) -> nn.Module:
        """The student."""
        return self.student

    def settle(self, cfg: CfgNode) -> CfgNode:
        """Returns the configuration with what the default recipe has come to (`DISTILL.METHODS` auto)."""
        return cfg if self.distilled is None else with_values(cfg, self.distilled.recipe)

    def build_parts(self) -> None:
        """Makes the moving average, what evaluates, and what keeps the best checkpoint."""
        self.ema = build_ema(self.cfg, self.student)
        self.evaluation = StudentEvaluation(type(self), self.cfg, self.student, self.ema, self._trainer.device)
        self.best = BestCheckpoint.from_config(self.cfg)
        self.stopped_early = False
        self.teacher_time = TeacherTime(self.distilled.passes.clock) if self.distilled is not None else None
        if self.distilled is not None:
            connect_cache(self.cfg, self.distilled, self.data_loader)

    def build_checkpointer(self) -> DistillCheckpointer:
        """Returns what saves the student, and beside it what resuming needs."""
        return DistillCheckpointer(
            self.student,
            self.cfg.OUTPUT_DIR,
            trainer=weakref.proxy(self),
            distilled=self.distilled,
            ema=self.ema,
            methods=None if self.distilled is None else self.cfg.DISTILL.METHODS,
            settings=self.settings(),
            class_names=class_names(self.cfg),
        )

    def extra_hooks(self) -> list[HookBase | None]:
        """Returns calibration, average, checkpoints, pictures, evaluation, best checkpoint, result, in that order."""
        cfg = self.cfg
        ret: list[HookBase | None] = [
            CalibrationHook(self.distilled) if self.distilled is not None else None,
            self.teacher_time,
            EMAHook(self.ema) if self.ema is not None else None,
            CheckpointHook(cfg.SOLVER.CHECKPOINT_PERIOD),
            InterruptHook(self._trainer),
            build_masking_pictures(cfg, self.distilled) if comm.is_main_process() else None,
        ]
        if cfg.DATASETS.TEST:
            ret.append(EvaluationHook(cfg.TEST.EVAL_PERIOD, self._evaluate))
            ret.append(self.best)
            if cfg.TEST.AUG.ENABLED:
                ret.append(hooks.CallbackHook(after_train=lambda _: self._evaluate_with_tta()))
        return [*ret, ResultWriter(self.result_file, self._result)]

    def build_writers(self) -> list[EventWriter]:
        """Returns Detectron2's writers, the methods' lines in the log, and with `WANDB.ENABLED` Weights & Biases."""
        writers = [*super().build_writers(), DistillPrinter()]
        if self.cfg.WANDB.ENABLED:
            writers.append(WandbWriter(self.cfg, resumed=lambda: self.start_iter > 0))
        return writers

    def resume_or_load(self, resume: bool = True) -> None:
        """Continues from the last checkpoint of the output directory if asked to and possible.

        Else loads `MODEL.WEIGHTS` into the student and initializes its neck and heads from the teacher.
        """
        if resume and self.resume():
            return
        load_start(self.cfg, self.network, self.checkpointer)
        if self.ema is not None:
            self.ema.reset()

    def train(self) -> Any:
        """Evaluates the teacher (`DISTILL.TEACHER.EVAL_FIRST`), then trains. Returns the last evaluation's results.

        A run that was interrupted between its last iteration and its result is evaluated only.
        """
        if self.start_iter >= self.max_iter or (self.best is not None and self.best.exhausted):
            logger.info("%d of %d iterations are done, and no more are to come.", self.start_iter, self.max_iter)
            if comm.all_gather(os.path.isfile(self.result_file))[0]:
                logger.info("Nothing to do: the result is in %s", self.result_file)
                return None
            if comm.is_main_process() and not os.path.isfile(self._averaged_file):
                self.save_more("model_final")  # a run that was killed behind the student's
            self.stopped_early = self.start_iter < self.max_iter
            self.max_iter = self.start_iter
        if self.distilled is not None and self.cfg.DISTILL.TEACHER.EVAL_FIRST and self.start_iter == 0:
            with preserve_rng_state(self._trainer.device):
                self._evaluate_teacher(self.distilled.teacher)
        with contextlib.suppress(EarlyStop):
            super().train()
        if self.distilled is not None:
            tell_of_cache(self.distilled)
        results = self.evaluation.results
        if results is not None and len(self.cfg.TEST.EXPECTED_RESULTS) and comm.is_main_process():
            verify_results(self.cfg, results)
        return results

    def _evaluate_teacher(self, teacher: Teacher) -> None:
        try:
            evaluate_teacher(type(self), self.cfg, teacher)
        except TeacherError as error:
            logger.warning("%s It is not evaluated (DISTILL.TEACHER.EVAL_FIRST).", error)

    @property
    def finished(self) -> bool:
        """Whether the training has come to its end, early or not."""
        return self.stopped_early or super().finished

    def after_evaluation(self) -> None:
        """Ends the training where it no longer gets better; else completes this iteration's checkpoint."""
        if self.best is not None and self.best.exhausted:
            logger.info("%s has not risen for long: training ends early.", self.best.metric)
            self.stop_early()
        self.save_again()

    def stop_early(self) -> None:
        """Ends the training here as if this were its last iteration; all processes must call it.

        Raises:
            EarlyStop: always; `train` catches it.
        """
        self.stopped_early = True
        self.save("model_final")
        raise EarlyStop

    def save_more(self, name: str) -> None:
        """Writes the averaged weights beside the final checkpoint."""
        if name == "model_final" and self.ema is not None:
            write_weights(self._averaged_file, self.ema.model, class_names=self.checkpointer.about["class_names"])

    @property
    def _averaged_file(self) -> str:
        return os.path.join(self.cfg.OUTPUT_DIR, "model_final_ema.pth")

    def save_best(self, description: dict[str, Any]) -> None:
        """Writes the weights just evaluated as `model_best.pth`: the student's, or for a metric of it the average's."""
        averaged = self.ema if description["metric"].partition("/")[0].endswith("_EMA") else None
        if comm.is_main_process():
            path = os.path.join(self.cfg.OUTPUT_DIR, "model_best.pth")
            weights = self.student if averaged is None else averaged.model
            write_weights(path, weights, best=description, class_names=self.checkpointer.about["class_names"])

    def _evaluate(self) -> dict[str, Any]:
        results = self.evaluation.run()
        if self.best is not None:
            self.best.judge(results)
        return results

    def _evaluate_with_tta(self) -> None:
        if self.finished:
            self.storage.put_scalars(**self.evaluation.run_with_tta(), smoothing_hint=False)

    def _result(self) -> dict[str, Any]:
        cfg = self.cfg
        return {
            "metrics": self.evaluation.results or {},
            "datasets": list(cfg.DATASETS.TEST),
            "wall_time_s": round(self.wall_time.seconds, 2),
            "teacher_time_s": None if self.teacher_time is None else round(self.teacher_time.seconds, 2),
            "iterations": min(self.iter + 1, self.max_iter),
            "images_per_batch": cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.ACCUMULATE,
            "params": _num_parameters(self.student),
            "seed": getattr(self.data_loader, "seed", None),
            "methods": list(cfg.DISTILL.METHODS) if self.distilled is not None else [],
            "best": None if self.best is None else self.best.describe(),
            "stopped_early": self.stopped_early,
        }


def _num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
