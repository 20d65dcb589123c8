"""Distillation from Python, in a notebook or a program: one call, or the parts of a loop of one's own."""

import contextlib
import hashlib
import inspect
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from d2kd import modeling
from d2kd.config import list_settings
from d2kd.data.loader import build_train_loader
from d2kd.engine import DistillTrainer, argument_parser, build_optimizer, calibrate, load_start, setup_training
from d2kd.engine import load_config as load_yaml
from d2kd.engine.epochs import with_iterations
from d2kd.errors import ConfigError, did_you_mean
from d2kd.modeling import DistilledModel
from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger

__all__ = [
    "TrainingResult",
    "build_distilled_model",
    "build_optimizer",
    "build_train_loader",
    "calibrate",
    "distill",
    "evaluate",
    "load_config",
    "train",
]

#: A dataset: its name, what an entry of `DATASETS.REGISTER` has, or several of them.
Data = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]

#: Whose lines a run shows, and writes into its log.txt.
_LOGGERS = ("d2kd", "detectron2", "d2lite", "fvcore")


@dataclass(frozen=True)
class TrainingResult:
    """What a training came to.

    Attributes:
        metrics: of the last evaluation of the student, e.g. `metrics["bbox"]["AP"]`; empty without a test set.
        teacher_metrics: the same of the teacher; None where it was not evaluated.
        student: the plain Detectron2 model as it was trained, in evaluation mode.
        paths: files of the run that are there: "weights" (model_final.pth), "best" (model_best.pth), "averaged"
            (model_final_ema.pth), "config", "result", "metrics", "log".
        cfg: the configuration that was in force.
    """

    metrics: Mapping[str, Any]
    teacher_metrics: Mapping[str, Any] | None
    student: nn.Module
    paths: Mapping[str, Path]
    cfg: CfgNode

    def __repr__(self) -> str:
        numbers = {
            task: values.get("AP") if isinstance(values, dict) else values for task, values in self.metrics.items()
        }
        return f"TrainingResult({numbers}, {self.cfg.OUTPUT_DIR})"


def distill(
    student: str | os.PathLike[str],
    teacher: str | os.PathLike[str] | None = None,
    teacher_weights: str | os.PathLike[str] | None = None,
    data: Mapping[str, Data] | None = None,
    *,
    methods: str | Sequence[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    imports: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    **keys: Any,
) -> TrainingResult:
    """Trains a student by distillation, as `d2kd train` does, in this process and on one device.

    >>> result = d2kd.distill("student.yaml", "teacher.yaml", "teacher.pth", output="run", SOLVER__MAX_ITER=1000)

    Args:
        student: its YAML, or the name of a recipe.
        teacher: its YAML; None where the student's names one.
        teacher_weights: its checkpoint, by a path or name; None takes what the YAMLs say.
        data: {"train": ..., "test": ...} in place of the student's DATASETS; each is the name of a dataset, an entry of
            `DATASETS.REGISTER` such as {"JSON": "train.json", "IMAGES": "images"} (a NAME is not needed), or a list.
        methods: `DISTILL.METHODS`; None takes what the YAML says.
        output: the folder of the run, `OUTPUT_DIR`.
        resume: continue the run that is there.
        overwrite: remove the run that is there.
        imports: files and modules with methods, architectures, ... of one's own.
        overrides: values by key, {"SOLVER.MAX_ITER": 1000}.
        **keys: values by key with "__" for ".", SOLVER__MAX_ITER=1000; or some together, SOLVER={"MAX_ITER": 1000}.

    Raises:
        UserError: whatever `d2kd train` ends with in one line, with the same words.
    """
    options = _options("distill", data, methods, overrides, keys, student, imports)
    options = [*_teacher_options(teacher, teacher_weights), *options]
    return _train(student, options, output, resume, overwrite, imports, needs_teacher=True)


def train(
    student: str | os.PathLike[str],
    data: Mapping[str, Data] | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    imports: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    **keys: Any,
) -> TrainingResult:
    """Trains a model alone, a teacher or a baseline: a teacher that its YAML names is left out.

    Arguments and errors are otherwise those of `distill`.
    """
    options = _options("train", data, None, overrides, keys, student, imports)
    alone = ["DISTILL.TEACHER.CONFIG_FILE", "''", "DISTILL.TEACHER.WEIGHTS", "''"]
    return _train(student, [*options, *alone], output, resume, overwrite, imports, needs_teacher=False)


def load_config(
    config_file: str | os.PathLike[str],
    teacher: str | os.PathLike[str] | None = None,
    teacher_weights: str | os.PathLike[str] | None = None,
    data: Mapping[str, Data] | None = None,
    *,
    methods: str | Sequence[str] | None = None,
    imports: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    **keys: Any,
) -> CfgNode:
    """Returns the configuration of a loop of one's own; datasets are registered, and the device is one that is there.

    Arguments and errors are those of `distill`.
    """
    options = _options("load_config", data, methods, overrides, keys, config_file, imports)
    cfg = load_yaml(os.fspath(config_file), [*_teacher_options(teacher, teacher_weights), *options], imports)
    return with_iterations(cfg)


def build_distilled_model(cfg: CfgNode) -> DistilledModel:
    """Returns student, teacher and methods, ready for the first step.

    The student has the weights of `MODEL.WEIGHTS`, and its neck and heads are the teacher's where
    `DISTILL.INIT_FROM_TEACHER` says so (`d2kd.modeling.build_distilled_model` leaves it as it was initialized). In
    training mode the model returns a dict of losses, within an `EventStorage` or not; `.student` is the plain model.

    Raises:
        UserError: what does not fit, with the configuration key to change.
    """
    model = modeling.build_distilled_model(cfg)
    load_start(cfg, model)
    return model


def evaluate(cfg: CfgNode, model: nn.Module) -> Mapping[str, Any]:
    """Returns the metrics of a model on `DATASETS.TEST`, e.g. `["bbox"]["AP"]`; of several sets, by their names.

    Args:
        cfg: its configuration; predictions are written below `OUTPUT_DIR`.
        model: a Detectron2 model, in any mode; of a `DistilledModel` the student is evaluated.

    Raises:
        UserError: the test set cannot be used.
    """
    DistillTrainer.check_config(cfg, ("TEST",))
    return DistillTrainer.test(cfg, model.student if isinstance(model, DistilledModel) else model)


def _train(
    student: str | os.PathLike[str],
    options: list[Any],
    output: str | os.PathLike[str] | None,
    resume: bool,
    overwrite: bool,
    imports: Sequence[str],
    needs_teacher: bool,
) -> TrainingResult:
    args = argument_parser().parse_args([])
    args.config_file, args.imports = os.fspath(student), list(imports)
    args.opts = [*options, *([] if output is None else ["OUTPUT_DIR", repr(os.fspath(output))])]
    args.resume, args.overwrite = resume, overwrite
    with _own_log():
        # before the folder of the run is claimed
        if needs_teacher and not modeling.is_distillation(load_yaml(args.config_file, args.opts, imports, [])):
            raise ConfigError(
                f"distill() needs a teacher, and {args.config_file} names none: give its YAML and checkpoint, "
                "teacher=... and teacher_weights=...; d2kd.train() trains the student alone."
            )
        with setup_training(args) as cfg:
            trainer = DistillTrainer(cfg)
            trainer.resume_or_load(resume=resume)
            trainer.train()
    return _result(trainer)


def _result(trainer: DistillTrainer) -> TrainingResult:
    folder = Path(trainer.cfg.OUTPUT_DIR)
    files = {
        "weights": "model_final.pth",
        "best": "model_best.pth",
        "averaged": "model_final_ema.pth",
        "config": "config.yaml",
        "result": "result.json",
        "metrics": "metrics.json",
        "log": "log.txt",
    }
    metrics: Mapping[str, Any] | None = trainer.evaluation.results
    if metrics is None:  # a run that was at its end already
        metrics = _metrics(folder / "result.json")
    return TrainingResult(
        metrics=metrics or {},
        teacher_metrics=_metrics(folder / "teacher" / "result.json"),
        student=trainer.student.eval(),
        paths={name: folder / file for name, file in files.items() if (folder / file).is_file()},
        cfg=trainer.cfg,
    )


def _metrics(file: Path) -> Mapping[str, Any] | None:
    return dict(json.loads(file.read_text(encoding="utf-8"))["metrics"]) if file.is_file() else None


@contextlib.contextmanager
def _own_log() -> Iterator[None]:
    """Takes the handlers of a run from the loggers when it ends: the next one in this process has files of its own."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(list(logger.handlers), logger.propagate) for logger in loggers]
    try:
        yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before):
            for handler in [handler for handler in logger.handlers if handler not in handlers]:
                logger.removeHandler(handler)
                handler.close()
            logger.propagate = propagate
        # Detectron2's remembers what it has set up
        getattr(setup_logger, "cache_clear", lambda: None)()


def _teacher_options(teacher: str | os.PathLike[str] | None, weights: str | os.PathLike[str] | None) -> list[Any]:
    named = {"DISTILL.TEACHER.CONFIG_FILE": teacher, "DISTILL.TEACHER.WEIGHTS": weights}
    return [x for key, path in named.items() if path is not None for x in (key, repr(os.fspath(path)))]


def _options(
    function: str,
    data: Mapping[str, Data] | None,
    methods: str | Sequence[str] | None,
    overrides: Mapping[str, Any] | None,
    keys: Mapping[str, Any],
    config_file: str | os.PathLike[str],
    imports: Sequence[str],
) -> list[Any]:
    """Returns ["KEY", value, ...] as a command line has it: text is quoted, so that it stays text."""
    changes: dict[str, Any] = {}
    if data is not None:
        changes |= _data_keys(function, data, load_yaml(os.fspath(config_file), (), imports, []))
    if methods is not None:
        changes["DISTILL.METHODS"] = [methods] if isinstance(methods, str) else list(methods)
    for key, value in (*_flat(overrides or {}), *_flat({_key(function, k): value for k, value in keys.items()})):
        changes[key] = value
    return [x for key, value in changes.items() for x in (key, _quoted(value))]


def _key(function: str, word: str) -> str:
    """Returns the key that a keyword stands for; SOLVER stands for all keys below it."""
    if word == word.upper():
        return word.replace("__", ".")
    keys = {key.rpartition(".")[2].lower(): key.replace(".", "__") for key in list_settings()}
    arguments = list(inspect.signature(distill).parameters)
    hint = f" There is {keys[word]}." if word in keys else did_you_mean(word, arguments)
    raise ConfigError(
        f"{function}() has no argument {word!r}.{hint} Keys of the configuration have capitals, and '__' for '.': "
        "SOLVER__MAX_ITER=1000."
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _quoted(value: Any) -> Any:
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    return repr(value) if isinstance(value, str) else value


def _data_keys(function: str, data: Mapping[str, Data], cfg: CfgNode) -> dict[str, Any]:
    """Returns the keys below DATASETS that register data, and name it."""
    unknown = [key for key in data if key not in ("train", "test")] if isinstance(data, Mapping) else [data]
    if unknown:
        raise ConfigError(f'{function}(): data has {unknown[0]!r}; it is {{"train": ..., "test": ...}}.')
    registered, keys = list(cfg.DATASETS.REGISTER), {}
    for split, given in data.items():
        names = []
        for entry in _each(f'{function}(): data["{split}"]', given):
            if isinstance(entry, str):
                names.append(entry)
                continue
            entry = {key: os.fspath(x) if isinstance(x, os.PathLike) else x for key, x in entry.items()}
            entry = {"NAME": _name(split, entry), **entry}
            names.append(entry["NAME"])
            registered += [entry] if entry not in registered else []
        keys[f"DATASETS.{split.upper()}"] = names
    return {"DATASETS.REGISTER": registered, **keys}


def _each(where: str, given: Data) -> Iterable[str | Mapping[str, Any]]:
    """The datasets that are given."""
    entries = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    for entry in entries:
        is_entry = isinstance(entry, Mapping) and all(isinstance(key, str) for key in entry)
        if not (is_entry or isinstance(entry, str)):
            raise ConfigError(
                f"{where} has {entry!r}; it is the name of a dataset, an entry of DATASETS.REGISTER such as "
                '{"JSON": "train.json", "IMAGES": "images"}, or a list of them.'
            )
    return entries


def _name(split: str, entry: Mapping[str, Any]) -> str:
    """A name that the same data have every time, and other data do not."""
    return f"{split}_{hashlib.blake2b(repr(sorted(entry.items())).encode(), digest_size=4).hexdigest()}"
