"""Evaluating students, their variants (moving average, test-time augmentation) and teachers on `DATASETS.TEST`."""

import inspect
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from d2kd.config import get_key, with_values
from d2kd.data.classes import class_names, require_same_classes
from d2kd.errors import ConfigError
from d2kd.evaluation.build import folder_of
from d2kd.evaluation.missing import explain_nan
from d2kd.evaluation.side_by_side import side_by_side
from d2kd.files import file_checksum, write_json
from d2kd.modeling import Teacher, TeacherError, build_network, load_strictly, load_teacher, teacher_config
from d2kd.modeling.architectures import architecture_class, architecture_of, check_test_augmentation
from d2kd.modeling.classes import Classes, ClassNames, classes_of, match_classes
from d2kd.rng import preserve_rng_state
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format, verify_results
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from .checkpoint import broadcast_buffers
from .ema import ModelEMA
from .run_files import holds_a_run
from .run_settings import other_predictions, write_config

logger = logging.getLogger(__name__)

#: Metrics as Detectron2's evaluators give them: of the first dataset, or by dataset where there are several.
Results = Mapping[str, Any]


class StudentEvaluation:
    """Evaluates the student of a run, and its moving average where there is one.

    Attributes:
        results: of the last evaluation; None before.
    """

    def __init__(
        self, trainer_class: Any, cfg: CfgNode, student: nn.Module, ema: ModelEMA | None, device: torch.device
    ) -> None:
        """
        Args:
            trainer_class: its `test` evaluates.
            cfg: of the run.
            student: that is trained.
            ema: its moving average.
            device: of both.
        """
        self._trainer_class = trainer_class
        self._cfg = cfg
        self._student = student
        self._ema = ema
        self._device = device
        self.results: dict[str, Any] | None = None

    def run(self) -> dict[str, Any]:
        """Evaluates; the average's results have names that end in "_EMA". All processes must call it."""
        # evaluation draws random numbers (a loader's base seed); a run that is resumed after it must not notice
        with preserve_rng_state(self._device):
            for model in [self._student] if self._ema is None else [self._student, self._ema.model]:
                broadcast_buffers(model)
            results = dict(self._trainer_class.test(self._cfg, self._student))
            if self._ema is not None:
                results.update(evaluate_variant(self._trainer_class, self._cfg, self._ema.model, "EMA"))
        self.results = results
        return results

    def run_with_tta(self) -> dict[str, float]:
        """Adds the results with test-time augmentation to the last ones; returns them as "task/metric"."""
        results = self._trainer_class.test_with_tta(self._cfg, self._student)
        self.results = {**(self.results or {}), **results}
        return flatten_results_dict(results)


def evaluate(
    trainer_class: Any,
    cfg: CfgNode,
    model: nn.Module,
    evaluators: DatasetEvaluator | list[DatasetEvaluator] | None = None,
) -> Results:
    """Evaluates a model on `DATASETS.TEST`.

    Args:
        trainer_class: its `build_test_loader` and `build_evaluator` are used.
        cfg: names the test sets.
        model: in any mode; left in the same.
        evaluators: one per test set; None builds them.

    Raises:
        ValueError: not as many evaluators as test sets.
    """
    names = list(cfg.DATASETS.TEST)
    if evaluators is None:
        evaluators = [trainer_class.build_evaluator(cfg, name) for name in names]
    elif isinstance(evaluators, DatasetEvaluator):
        evaluators = [evaluators]
    if len(evaluators) != len(names):
        raise ValueError(f"There are {len(names)} test datasets, but {len(evaluators)} evaluators.")
    results = {}
    for name, evaluator in zip(names, evaluators):
        results[name] = inference_on_dataset(model, trainer_class.build_test_loader(cfg, name), evaluator)
        if comm.is_main_process():
            logger.info("Evaluation results for %s in csv format:", name)
            print_csv_format(results[name])
            without = getattr(evaluator, "without_predictions", ())
            for line in explain_nan(results[name] or {}, name, without, _score_threshold(cfg)):
                logger.info("%s", line)
    return next(iter(results.values())) if len(results) == 1 else results


def _score_threshold(cfg: CfgNode) -> str:
    key = architecture_class(cfg).SCORE_THRESHOLD
    return f"{key} {get_key(cfg, key)}" if key else ""


def evaluate_variant(trainer_class: Any, cfg: CfgNode, model: nn.Module, suffix: str) -> dict[str, Any]:
    """Evaluates a variant of the student: results "<name>_<suffix>", predictions in `inference_<suffix>`."""
    logger.info("Evaluating the variant %s", suffix)
    folder = os.path.join(cfg.OUTPUT_DIR, f"inference_{suffix}")
    kinds = [p.kind for p in inspect.signature(trainer_class.build_evaluator).parameters.values()]
    if kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) > 2 or inspect.Parameter.VAR_POSITIONAL in kinds:
        folders = [folder_of(cfg, name, folder) for name in cfg.DATASETS.TEST]
        evaluators = [trainer_class.build_evaluator(cfg, *where) for where in zip(cfg.DATASETS.TEST, folders)]
    else:  # as Detectron2 has it: the folder is one below OUTPUT_DIR
        elsewhere = cfg.clone()
        elsewhere.defrost()
        elsewhere.OUTPUT_DIR = folder
        evaluators = [trainer_class.build_evaluator(elsewhere, name) for name in cfg.DATASETS.TEST]
    return {f"{name}_{suffix}": value for name, value in trainer_class.test(cfg, model, evaluators).items()}


def evaluate_with_tta(trainer_class: Any, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
    """Evaluates with test-time augmentation (`TEST.AUG`); the results' names end in "_TTA".

    Raises:
        ConfigError: the architecture has none.
    """
    check_test_augmentation(cfg)
    return evaluate_variant(trainer_class, cfg, architecture_of(model).with_test_augmentation(cfg, model), "TTA")


def evaluate_student(trainer_class: Any, cfg: CfgNode, resume: bool) -> dict[str, Any]:
    """Evaluates `MODEL.WEIGHTS`, or with `resume` the last checkpoint of `OUTPUT_DIR`; every key must fit.

    Writes `result.json` and predictions for reports: into `OUTPUT_DIR`, or `OUTPUT_DIR/evaluation` where a training has
    its own there. The training's result is not written anew; its predictions are, if it is the same evaluation again:
    of the same weights on the same test sets, under the same settings.

    Raises:
        ConfigError: there is nothing to evaluate.
        StrictLoadingError: the checkpoint does not fit.
    """
    results = _evaluate_weights(trainer_class, cfg, *_load_student(cfg, resume))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def evaluate_teacher_and_student(trainer_class: Any, cfg: CfgNode, resume: bool) -> dict[str, Results]:
    """Evaluates both as `evaluate_teacher` and `evaluate_student` do, and logs their results side by side.

    Returns:
        Results by "teacher" and "student"; those of other processes than the main one are empty.

    Raises:
        ConfigError, StrictLoadingError, TeacherError: see there; before anything is evaluated.
    """
    weights, student = _load_student(cfg, resume)
    teacher_cfg = _teacher_config(cfg)
    teacher = _load_teacher(cfg, teacher_cfg)
    results: dict[str, Results] = {
        "teacher": _test_teacher(trainer_class, teacher_cfg, teacher),
        "student": _evaluate_weights(trainer_class, cfg, weights, student),
    }
    if comm.is_main_process():
        table = side_by_side(results["teacher"], results["student"])
        logger.info("Teacher and student on %s:\n%s", ", ".join(cfg.DATASETS.TEST), table)
        verify_results(cfg, results["student"])
    return results


def weights_to_evaluate(cfg: CfgNode, resume: bool) -> str:
    """Returns the path or name of the student's weights, of which files that it names itself are there.

    Args:
        cfg: of the evaluation.
        resume: take the last checkpoint of OUTPUT_DIR, if there is one.

    Raises:
        ConfigError: there are none.
    """
    last = DetectionCheckpointer(None, cfg.OUTPUT_DIR)
    if resume and last.has_checkpoint():
        return str(last.get_checkpoint_file())
    path = str(cfg.MODEL.WEIGHTS)
    if not path:
        raise ConfigError(
            "--eval-only has nothing to evaluate: give MODEL.WEIGHTS, or --resume for the last checkpoint of "
            "OUTPUT_DIR (for the teacher alone: d2kd train --eval-teacher)."
        )
    if "://" not in path and not os.path.isfile(path.partition("?")[0]):
        raise ConfigError(f"MODEL.WEIGHTS is {path!r}: there is no such file.")
    return path


def _load_student(cfg: CfgNode, resume: bool) -> tuple[str, nn.Module]:
    path = weights_to_evaluate(cfg, resume)
    model = build_network(cfg, "--config-file")
    saved = load_strictly(model, path, "student", "--config-file and MODEL.WEIGHTS")
    _check_class_names(cfg, path, saved.get("class_names"))
    return path, model


def _evaluate_weights(trainer_class: Any, cfg: CfgNode, path: str, model: nn.Module) -> dict[str, Any]:
    trained = holds_a_run(cfg.OUTPUT_DIR)
    difference = _difference_to_result(cfg, path) if trained else None
    comm.synchronize()
    if difference is not None:
        folder = os.path.join(cfg.OUTPUT_DIR, "evaluation")
        logger.info("Predictions and result go to %s: the run of %s %s.", folder, cfg.OUTPUT_DIR, difference)
        cfg = with_values(cfg, {"OUTPUT_DIR": folder})
    results = dict(trainer_class.test(cfg, model))
    if cfg.TEST.AUG.ENABLED:
        results.update(trainer_class.test_with_tta(cfg, model))
    if comm.is_main_process() and (difference is not None or not trained):
        write_config(cfg)
        _write_result(cfg, results, model, path)
    return results


def _difference_to_result(cfg: CfgNode, weights: str) -> str | None:
    """Why these weights on these test sets are not what the `result.json` of OUTPUT_DIR is about; None if they are."""
    folder = Path(cfg.OUTPUT_DIR)
    try:
        datasets = json.loads((folder / "result.json").read_text())["datasets"]
        setting = other_predictions(cfg)
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return "has no result and configuration to compare with"
    if os.path.realpath(weights) != os.path.realpath(folder / "model_final.pth"):
        return f"has the result of model_final.pth, not of {weights}"
    if datasets != list(cfg.DATASETS.TEST):
        return (
            f"has the result on {', '.join(map(str, datasets)) or 'no dataset'}, not on {', '.join(cfg.DATASETS.TEST)}"
        )
    return None if setting is None else f"was evaluated with other settings ({setting})"


def _write_result(cfg: CfgNode, results: Results, model: nn.Module, weights: str) -> None:
    params = sum(p.numel() for p in model.parameters())
    content = {"metrics": results, "datasets": list(cfg.DATASETS.TEST), "params": params, "weights": weights}
    # a training may go on, and put other weights into this file
    content["weights_checksum"] = file_checksum(weights) if os.path.isfile(weights) else None
    write_json(os.path.join(cfg.OUTPUT_DIR, "result.json"), content)


def _check_class_names(cfg: CfgNode, path: str, saved: ClassNames | None) -> None:
    """Compares the classes of the test sets with those that a checkpoint was trained for, or else with those of
    DATASETS.TRAIN; older checkpoints do not tell theirs.

    Raises:
        DatasetError: they differ.
    """
    data, train = class_names(cfg, ("TEST",)), class_names(cfg, ("TRAIN",))
    for kind, names in data.items():
        if saved is not None and kind in saved:
            require_same_classes(
                saved[kind], f"The checkpoint {path}", names, f"DATASETS.TEST {cfg.DATASETS.TEST[0]!r}"
            )
        elif kind in train:
            require_same_classes(
                train[kind],
                f"DATASETS.TRAIN {cfg.DATASETS.TRAIN[0]!r}",
                names,
                f"DATASETS.TEST {cfg.DATASETS.TEST[0]!r}",
            )


def evaluate_teacher(trainer_class: Any, cfg: CfgNode, teacher: Teacher | None = None) -> Results:
    """Evaluates the teacher on `cfg.DATASETS.TEST`, with its own input sizes and channel order, and under the student's
    limits (see `teacher_config`).

    Writes `OUTPUT_DIR/teacher/result.json`.

    Args:
        trainer_class: its `test` evaluates.
        cfg: the student's configuration, which names the teacher.
        teacher: if it is loaded already.

    Raises:
        TeacherError: its classes are not those of the data, so that its metrics are not defined there.
    """
    teacher_cfg = _teacher_config(cfg)
    if teacher is None:
        teacher = _load_teacher(cfg, teacher_cfg)
    else:
        _require_classes_of_data(cfg, teacher.classes)
    return _test_teacher(trainer_class, teacher_cfg, teacher)


def _test_teacher(trainer_class: Any, teacher_cfg: CfgNode, teacher: Teacher) -> Results:
    logger.info("Evaluating the teacher on %s", ", ".join(teacher_cfg.DATASETS.TEST))
    results = trainer_class.test(teacher_cfg, teacher.model)
    if comm.is_main_process():
        _write_result(teacher_cfg, results, teacher.model, teacher_cfg.MODEL.WEIGHTS)
    return results


def _teacher_config(cfg: CfgNode) -> CfgNode:
    teacher_cfg = teacher_config(cfg)
    teacher_cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "teacher")
    teacher_cfg.DATALOADER.NUM_WORKERS = cfg.DATALOADER.NUM_WORKERS
    teacher_cfg.DATASETS.TEST = cfg.DATASETS.TEST
    teacher_cfg.TEST.IMS_PER_BATCH = cfg.TEST.IMS_PER_BATCH
    return teacher_cfg


def _load_teacher(cfg: CfgNode, teacher_cfg: CfgNode) -> Teacher:
    _require_classes_of_data(cfg, classes_of(teacher_cfg))  # their number is known before the weights are
    teacher = Teacher(*load_teacher(teacher_cfg))
    _require_classes_of_data(cfg, teacher.classes)
    return teacher


def _require_classes_of_data(cfg: CfgNode, teacher: Mapping[str, Classes]) -> None:
    for match in match_classes(classes_of(cfg, datasets=cfg.DATASETS.TEST), teacher).values():
        if not match.same:
            raise TeacherError(
                f"The teacher's metrics on {', '.join(cfg.DATASETS.TEST)} are not defined: the data have "
                f"{match.student}, and the teacher {match.teacher} ({match.teacher.key} of "
                "DISTILL.TEACHER.CONFIG_FILE)."
            )
