"""What every tool shares: arguments, the configuration they give, and the first lines of the log."""

import argparse
import difflib
import logging
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from d2kd.config import ConfigError, add_distill_config
from d2kd.data.datasets import register_datasets
from d2kd.runtime import RUNTIME
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

logger = logging.getLogger(__name__)


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments and those that turn any configuration into a distillation run."""
    parser = default_argument_parser()
    group = parser.add_argument_group("distillation")
    group.add_argument("--teacher-config", metavar="FILE", help="YAML of the teacher (DISTILL.TEACHER.CONFIG_FILE)")
    group.add_argument("--teacher-weights", metavar="FILE", help="checkpoint of the teacher (DISTILL.TEACHER.WEIGHTS)")
    group.add_argument("--method", metavar="NAME[,NAME]", help="methods to distil with (DISTILL.METHODS)")
    group.add_argument("--eval-teacher", action="store_true", help="evaluate the teacher only")
    return parser


def setup(args: argparse.Namespace) -> CfgNode:
    """Configuration from the arguments, with logging, seeds and the datasets of `DATASETS.REGISTER` set up.

    Raises:
        ConfigError: the file is missing, or a key or value is wrong; the message lists near matches.
    """
    cfg = load_config(args.config_file, command_line_options(args))
    if args.method and not cfg.DISTILL.TEACHER.CONFIG_FILE:
        raise ConfigError(
            f"--method {args.method} needs a teacher: name its YAML (--teacher-config) and checkpoint "
            "(--teacher-weights)."
        )
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    _use_device(cfg.MODEL.DEVICE)
    register_datasets(cfg)
    cfg.freeze()
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="d2kd")
    log_runtime(cfg.MODEL.DEVICE, str(cfg.SEED) if cfg.SEED >= 0 else "random")
    default_setup(cfg, args)
    return cfg


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


def load_config(config_file: str, options: list[str] | None = None) -> CfgNode:
    """Detectron2's defaults and d2kd's, changed by a YAML file and a list of ["KEY", "value", ...].

    Raises:
        ConfigError: see `setup`.
    """
    cfg = get_cfg()
    add_distill_config(cfg)
    if config_file:
        if not os.path.isfile(config_file):
            raise ConfigError(f"--config-file is {config_file!r}: there is no such file.")
        _merge(cfg, cfg.merge_from_file, config_file, f"--config-file {config_file}")
    flags = [str(o) for o in options or [] if str(o).startswith("--")]
    if flags:
        raise ConfigError(f"{' '.join(flags)}: flags go before the first KEY VALUE.")
    if options and len(options) % 2:
        raise ConfigError(f"Options come in pairs, KEY VALUE; these are {len(options)}: {' '.join(options)}")
    _merge(cfg, cfg.merge_from_list, _whole_numbers_as_floats(cfg, options or []), "the command line")
    _resolve_teacher_config(cfg, config_file)
    if cfg.DISTILL.TEACHER.WEIGHTS and not cfg.DISTILL.TEACHER.CONFIG_FILE:
        raise ConfigError(
            f"DISTILL.TEACHER.WEIGHTS (--teacher-weights) is {cfg.DISTILL.TEACHER.WEIGHTS}, and no "
            "DISTILL.TEACHER.CONFIG_FILE (--teacher-config) says which network these are."
        )
    return cfg


def _use_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"MODEL.DEVICE is {name!r}; it must be cuda, cpu, or one GPU, such as cuda:1.") from error
    if device.type != "cuda" or device.index is None:
        return
    if comm.get_world_size() > 1:
        raise ConfigError(f"MODEL.DEVICE is {name!r}: several processes have a GPU each; set it to cuda.")
    if device.index >= torch.cuda.device_count():
        raise ConfigError(f"MODEL.DEVICE is {name!r}, and this machine has {torch.cuda.device_count()} GPU(s).")
    torch.cuda.set_device(device)  # whose random state is then saved, and whose memory is shown


def command_line_options(args: argparse.Namespace) -> list[str]:
    """The changes to the configuration that a command line asks for, ["KEY", "value", ...]."""
    changes = [o for o in args.opts if o != "--"]
    for key, value in (
        ("DISTILL.TEACHER.CONFIG_FILE", args.teacher_config),
        ("DISTILL.TEACHER.WEIGHTS", args.teacher_weights),
        ("DISTILL.METHODS", repr(args.method.split(",")) if args.method else None),
    ):
        if value is not None:
            changes += [key, value]
    return changes


def _whole_numbers_as_floats(cfg: CfgNode, options: list[str]) -> list[str]:
    """Lets "KEY 8" set a key that holds a float; the configuration system itself wants "8.0"."""
    floats = {key for key, value in _leaves(cfg) if isinstance(value, float)}

    def is_whole(i: int) -> bool:
        return i % 2 == 1 and options[i - 1] in floats and re.fullmatch(r"-?\d+", str(options[i])) is not None

    return [f"{option}.0" if is_whole(i) else option for i, option in enumerate(options)]


def _merge(cfg: CfgNode, merge: Callable[[Any], None], what: Any, where: str) -> None:
    try:
        merge(what)
    except (KeyError, ValueError, AssertionError, OSError) as error:
        message = str(error.args[0] if error.args else error)
        unknown = re.search(r"[Nn]on-existent (?:config )?key:? ?([\w.]+)", message)
        hint = ""
        if unknown and "mean" not in message:
            near = difflib.get_close_matches(unknown.group(1), list(dict(_leaves(cfg))), n=3, cutoff=0.6)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"In {where}: {message.rstrip('.')}{'' if message.endswith('?') else '.'}{hint}") from error


def _leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _resolve_teacher_config(cfg: CfgNode, config_file: str) -> None:
    path = cfg.DISTILL.TEACHER.CONFIG_FILE
    beside = os.path.join(os.path.dirname(config_file or ""), path)
    if path and not os.path.isfile(path) and os.path.isfile(beside):
        cfg.DISTILL.TEACHER.CONFIG_FILE = beside


def _device_name(device: str) -> str:
    return (
        f"{device} ({torch.cuda.get_device_name(device)})"
        if device.startswith("cuda")
        else f"{device} ({torch.get_num_threads()} threads)"
    )
