"""What every tool shares: the configuration that its arguments give, and the first lines of the log."""

import argparse
import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from d2kd.arguments import check_no_flags, command_line_options
from d2kd.config_reader import read_config, tell
from d2kd.data.datasets import register_datasets
from d2kd.errors import ConfigError
from d2kd.files import near_configs, replacing
from d2kd.model_zoo import find_config_or_zoo
from d2kd.modeling import is_distillation, read_teacher_config
from d2kd.modeling.library_weights import fetch_start
from d2kd.runtime import RUNTIME
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from .epochs import resolve_epochs, uses_epochs
from .evaluation import weights_to_evaluate
from .host_memory import reuse_freed_memory
from .run_folder import claimed_folder, prepare_folder
from .scaling import drop_late_steps, needs_scaling, scale_to_batch

logger = logging.getLogger(__name__)


def setup(args: argparse.Namespace) -> CfgNode:
    """Returns the configuration from the arguments of an evaluation, with logging, seeds and the datasets of
    `DATASETS.REGISTER` set up.

    Raises:
        ConfigError: see `read_arguments`; or there are no weights to evaluate.
        FolderError: OUTPUT_DIR cannot be written into.
    """
    cfg, told = _read(args)
    comm.synchronize()
    _start(cfg, args, told, keeps_config=True)
    return cfg


@contextlib.contextmanager
def setup_training(args: argparse.Namespace) -> Iterator[CfgNode]:
    """Gives the configuration of a training, set up as by `setup`, and its folder to itself until the end of the block.

    Another run that was there (`--overwrite`) is there again after an error before the first iteration is done.

    Raises:
        ConfigError: see `read_arguments`.
        FolderError: OUTPUT_DIR cannot be this run's.
    """
    cfg, (lengths, notices) = _read(args)
    comm.synchronize()  # every process has read what may be set aside now
    with claimed_folder(cfg, args.resume, getattr(args, "overwrite", False)) as done:
        if comm.is_main_process() and not args.resume:
            fetch_start(cfg)
        comm.synchronize()
        _start(cfg, args, (lengths, [*done, *notices]), keeps_config=args.resume)
        yield cfg


_Told = tuple[list[str], list[str]]


def _read(args: argparse.Namespace) -> tuple[CfgNode, _Told]:
    """The configuration, and what is to be logged about it; OUTPUT_DIR is there."""
    notices: list[str] = []  # for the log, which is not there yet
    cfg, lengths = read_arguments(args, notices)
    if getattr(args, "eval_only", False):
        weights_to_evaluate(cfg, args.resume)  # before there is a folder for what would not come
    if comm.is_main_process():
        prepare_folder(cfg.OUTPUT_DIR)
    return cfg, (lengths, notices)


def _start(cfg: CfgNode, args: argparse.Namespace, told: _Told, keeps_config: bool) -> None:
    start_log(cfg, *told, cfg.OUTPUT_DIR)
    with _keeping_config(cfg) if keeps_config else contextlib.nullcontext():
        default_setup(cfg, args)


def read_arguments(args: argparse.Namespace, notices: list[str]) -> tuple[CfgNode, list[str]]:
    """Returns the configuration from the arguments, and lines that say what rate and lengths in iterations it came to.

    Registers the datasets of `DATASETS.REGISTER`; writes nothing.

    Args:
        args: of the command; its `config_file` becomes a path.
        notices: takes what is to be logged.

    Raises:
        ConfigError: the file is missing, or a key or value is wrong; the message lists near matches.
    """
    args.config_file, _ = find_config_or_zoo(args.config_file, "--config-file")
    trains = not _only_evaluates(args)
    cfg = load_config(args.config_file, command_line_options(args), args.imports, notices, trains=trains)
    if args.method is not None and not cfg.DISTILL.TEACHER.CONFIG_FILE:
        raise ConfigError(
            f"--method {args.method} needs a teacher: name its YAML (--teacher-config) and checkpoint "
            "(--teacher-weights)."
        )
    if not (args.config_file or cfg.DATASETS.TRAIN or cfg.DATASETS.TEST):
        raise ConfigError("--config-file is missing: give the YAML of the model and its datasets.")
    if is_distillation(cfg):
        read_teacher_config(cfg, [])  # what is wrong there must be known now; it is read again where it is used
    _use_device(cfg.MODEL.DEVICE)
    register_datasets(cfg)
    lengths = [line for line in (scale_to_batch(cfg), resolve_epochs(cfg)) if line] if trains else []
    if lengths:
        _tell_of_schedule(cfg.SOLVER, notices)
    cfg.freeze()
    return cfg, lengths


def _only_evaluates(args: argparse.Namespace) -> bool:
    return getattr(args, "eval_only", False) or getattr(args, "eval_teacher", False)


def start_log(cfg: CfgNode, lengths: Sequence[str], notices: Sequence[str], folder: str | None = None) -> None:
    """Sets up the log, in a folder too where one is given, and writes what `read_arguments` has found."""
    setup_logger(folder, distributed_rank=comm.get_rank(), name="d2kd")
    log_runtime(cfg.MODEL.DEVICE, str(cfg.SEED) if cfg.SEED >= 0 else "random")
    for line in lengths:
        logger.info("%s", line)
    for notice in notices if comm.is_main_process() else ():
        logger.warning("%s", notice)
    if RUNTIME.name == "detectron2" and hasattr(torch._C, "_jit_set_profiling_executor"):
        # its scripted losses compute the first two calls of a process otherwise than those after them, so that a
        # resumed run would not be equal bit by bit
        torch._C._jit_set_profiling_executor(False)


@contextlib.contextmanager
def _keeping_config(cfg: CfgNode) -> Iterator[None]:
    """Keeps the configuration of the run in OUTPUT_DIR until another is in force there (see `ResumableTrainer`)."""
    path = Path(cfg.OUTPUT_DIR, "config.yaml")
    kept = path.read_bytes() if comm.is_main_process() and path.is_file() else None
    yield
    if kept is not None:
        with replacing(path) as temporary:
            temporary.write_bytes(kept)


def log_runtime(device: str = "cpu", seed: str = "none") -> None:
    """The first line of every log: what this runs on."""
    logger.info(
        "Runtime %s, torch %s, device %s, seed %s, %d process(es)",
        RUNTIME,
        torch.__version__,
        _device_name(device),
        seed,
        comm.get_world_size(),
    )


def load_config(
    config_file: str,
    options: Sequence[Any] | None = None,
    imports: Sequence[str] = (),
    notices: list[str] | None = None,
    *,
    trains: bool = True,
) -> CfgNode:
    """Returns Detectron2's defaults and d2kd's, changed by a YAML file and a list of ["KEY", "value", ...].

    The datasets of `DATASETS.REGISTER` are registered. Where there is no CUDA the device is the CPU, with a warning.

    Args:
        config_file: "" for none.
        options: changes on top of it.
        imports: files and modules with methods, architectures, ... of one's own, beside those of DISTILL.IMPORTS.
        notices: see `read_config`.
        trains: whether it is for a training, of which it is then told what looks wrong with its schedule.

    Raises:
        ConfigError: see `setup`.
    """
    config_file, _ = find_config_or_zoo(config_file, "--config-file")
    if config_file and not os.path.isfile(config_file):
        raise ConfigError(f"--config-file is {config_file!r}: there is no such file.{near_configs(config_file)}")
    check_no_flags(options or ())
    cfg = read_config(config_file, options or (), imports, notices=notices)
    teacher = cfg.DISTILL.TEACHER
    teacher.CONFIG_FILE, weights = find_config_or_zoo(
        teacher.CONFIG_FILE, "DISTILL.TEACHER.CONFIG_FILE (--teacher-config)"
    )
    teacher.WEIGHTS = teacher.WEIGHTS or weights
    if cfg.DISTILL.TEACHER.WEIGHTS and not cfg.DISTILL.TEACHER.CONFIG_FILE:
        raise ConfigError(
            f"DISTILL.TEACHER.WEIGHTS (--teacher-weights) is {cfg.DISTILL.TEACHER.WEIGHTS}, and no "
            "DISTILL.TEACHER.CONFIG_FILE (--teacher-config) says which network these are."
        )
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        tell(f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, and there is no CUDA device here: this runs on the CPU.", notices)
        cfg.MODEL.DEVICE = "cpu"
    register_datasets(cfg)
    if not (uses_epochs(cfg) or needs_scaling(cfg)):  # else the iterations are not known yet
        _tell_of_schedule(cfg.SOLVER, notices if trains else [])  # steps are dropped either way
    return cfg


def _tell_of_schedule(solver: CfgNode, notices: list[str] | None) -> None:
    if solver.WARMUP_ITERS >= solver.MAX_ITER > 0:
        tell(
            f"SOLVER.WARMUP_ITERS {solver.WARMUP_ITERS} is not below MAX_ITER, {solver.MAX_ITER}: the learning rate "
            "never comes to BASE_LR. Set WARMUP_ITERS, or WARMUP_EPOCHS, lower.",
            notices,
        )
    steps = tuple(solver.STEPS)
    if drop_late_steps(solver):
        tell(f"SOLVER.STEPS {steps}: those not below MAX_ITER, {solver.MAX_ITER}, have no effect.", notices)


def _use_device(name: str) -> None:
    device = torch.device(name)
    if device.type == "cpu":
        reuse_freed_memory()
    if device.type != "cuda" or device.index is None:
        return
    if comm.get_world_size() > 1:
        raise ConfigError(f"MODEL.DEVICE is {name!r}: several processes have a GPU each; set it to cuda.")
    if device.index >= torch.cuda.device_count():
        raise ConfigError(f"MODEL.DEVICE is {name!r}, and this machine has {torch.cuda.device_count()} GPU(s).")
    torch.cuda.set_device(device)  # whose random state is then saved, and whose memory is shown


def _device_name(device: str) -> str:
    return (
        f"{device} ({torch.cuda.get_device_name(device)})"
        if device.startswith("cuda")
        else f"{device} ({torch.get_num_threads()} threads)"
    )
