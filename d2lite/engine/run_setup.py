"""Setup of a training program: arguments, directories, logs, seed, metric writers, DDP."""

import argparse
import inspect
import logging
import os
import sys
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import d2lite
from d2lite.config import CfgNode
from d2lite.utils import comm
from d2lite.utils.collect_env import collect_env_info
from d2lite.utils.env import seed_all_rng
from d2lite.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter
from d2lite.utils.file_io import PathManager
from d2lite.utils.logger import setup_logger
from d2lite.utils.output import complete_file

__all__ = ["create_ddp_model", "default_argument_parser", "default_setup", "default_writers"]

FLOAT32_PRECISIONS = ("highest", "high", "medium")


def default_argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """Returns a parser with the arguments that Detectron2's training programs share.

    Args:
        epilog: text after the help; None shows examples.
    """
    examples = epilog or _EXAMPLES.format(program=os.path.basename(sys.argv[0]))
    parser = argparse.ArgumentParser(epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default="", metavar="FILE", help="path to the config file")
    parser.add_argument(
        "--resume", action="store_true", help="resume from the last checkpoint in OUTPUT_DIR, if there is one"
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate the model, do not train it")
    parser.add_argument("--num-gpus", type=int, default=1, help="number of processes *per machine*")
    parser.add_argument("--num-machines", type=int, default=1, help="number of machines")
    parser.add_argument("--machine-rank", type=int, default=0, help="rank of this machine, from 0")
    parser.add_argument(
        "--dist-url", default="auto", help="rendezvous address: tcp://host:port, or auto on one machine"
    )
    pairs = "changes to the config, as pairs at the end of the command: KEY VALUE KEY VALUE ..."
    parser.add_argument("opts", nargs=argparse.REMAINDER, help=pairs)
    return parser


_EXAMPLES = """
Examples:
  one process           {program} --config-file cfg.yaml
  four GPUs             {program} --config-file cfg.yaml --num-gpus 4
  other settings        {program} --config-file cfg.yaml MODEL.WEIGHTS weights.pth SOLVER.BASE_LR 0.001
  two machines, 8 GPUs  {program} --config-file cfg.yaml --num-gpus 4 --num-machines 2 \\
                          --machine-rank 0|1 --dist-url tcp://first-machine:port
"""


def default_setup(cfg: CfgNode, args: Any) -> None:
    """Prepares a run: output directory, logs, a record of versions, arguments and config, seed, backend settings.

    The full config goes to `<OUTPUT_DIR>/config.yaml`, the log to `<OUTPUT_DIR>/log.txt`.

    Args:
        cfg: the full config.
        args: the parsed command line; may be anything with or without `config_file` and `eval_only`.
    """
    rank, output_dir = comm.get_rank(), cfg.OUTPUT_DIR
    writes = bool(output_dir) and comm.is_main_process()
    if writes:
        PathManager.mkdirs(output_dir)
    logger = _setup_loggers(output_dir, rank)
    _set_float32_precision(cfg.FLOAT32_PRECISION)
    # Drawn here, and not in seed_all_rng, so that the first lines of the log report it.
    seed = cfg.SEED + rank if cfg.SEED >= 0 else int.from_bytes(os.urandom(4), "little") >> 1
    drawn = "" if cfg.SEED >= 0 else " (drawn; set SEED to repeat it)"
    logger.info("Runtime: d2lite %s, torch %s", d2lite.__version__, torch.__version__)
    logger.info("Device: %s; seed: %d%s", _describe_device(cfg.MODEL.DEVICE), seed, drawn)
    logger.info("Rank of current process: %d. World size: %d", rank, comm.get_world_size())
    logger.info("Environment info:\n%s", collect_env_info())
    logger.info("Command line arguments: %s", args)
    config_file = getattr(args, "config_file", "")
    if config_file:
        logger.info("Contents of args.config_file=%s:\n%s", config_file, _read_text(config_file))
    if writes:
        _save_config(cfg, os.path.join(output_dir, "config.yaml"))
    seed_all_rng(seed)
    # Timing the convolution algorithms for each image size pays off only if the size recurs often.
    if not getattr(args, "eval_only", False):
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK


def _setup_loggers(output_dir: str, rank: int) -> logging.Logger:
    output = output_dir or None
    setup_logger(output, distributed_rank=rank, name="fvcore")
    if "d2kd" in sys.modules:
        setup_logger(output, distributed_rank=rank, name="d2kd")
    setup_logger(output, distributed_rank=rank)
    return logging.getLogger(__name__)


def _set_float32_precision(precision: str) -> None:
    if not precision:
        return
    if precision not in FLOAT32_PRECISIONS:
        known = ", ".join(FLOAT32_PRECISIONS)
        raise ValueError(f"FLOAT32_PRECISION is '{precision}'; known are {known}, or empty for the default.")
    torch.set_float32_matmul_precision(precision)


def _describe_device(device: str) -> str:
    if device.startswith("cuda") and torch.cuda.is_available():
        return f"{device} ({torch.cuda.get_device_name()})"
    return device


def _read_text(path: str) -> str:
    with PathManager.open(path, "r") as f:
        return f.read()


def _save_config(cfg: CfgNode, path: str) -> None:
    with complete_file(path) as temporary, open(temporary, "w") as f:
        f.write(cfg.dump())
    logging.getLogger(__name__).info("Full config saved to %s", path)


def default_writers(output_dir: str, max_iter: int | None = None) -> list[EventWriter]:
    """Returns writers to the log, to `<output_dir>/metrics.json` and to TensorBoard.

    Args:
        output_dir: is made if it is missing.
        max_iter: for the estimate of the time left.
    """
    PathManager.mkdirs(output_dir)
    metrics = JSONWriter(os.path.join(output_dir, "metrics.json"))
    return [CommonMetricPrinter(max_iter), metrics, TensorboardXWriter(output_dir)]


def create_ddp_model(model: nn.Module, *, fp16_compression: bool = False, **kwargs: Any) -> nn.Module:
    """Wraps a model for training in several processes; with one process, returns it as it is.

    Args:
        model: on its device.
        fp16_compression: exchange gradients in half precision.
        **kwargs: of `DistributedDataParallel`.
    """
    if comm.get_world_size() < 2:
        return model
    if next(model.parameters()).is_cuda:
        kwargs.setdefault("device_ids", [comm.get_local_rank()])
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # since torch 2.15
    if renamed and "broadcast_buffers" in kwargs:
        kwargs["forward_sync_buffers"] = kwargs.pop("broadcast_buffers")
    wrapped = DistributedDataParallel(model, **kwargs)
    if fp16_compression:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

        wrapped.register_comm_hook(None, fp16_compress_hook)
    return wrapped
