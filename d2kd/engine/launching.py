"""Runs a tool in one process or many; what a user did wrong ends in one line, not in a traceback."""

import argparse
import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException

from d2kd.arguments import command_line_options
from d2kd.errors import ConfigError, UserError
from d2kd.interrupts import held_back_in_new_processes, raise_interrupts
from d2kd.settings import Setting
from detectron2.engine import launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from .hooks import Terminated
from .run_folder import DISK_ERRORS
from .setup import load_config

logger = logging.getLogger(__name__)

#: Seconds that a process waits with its error: if the main one has the same, it tells it, and ends all others.
_PATIENCE = 3.0


def run_tool(main: Callable[[], Any]) -> Any:
    """Runs a tool; a `UserError` becomes one line in the log and exit status 2, Ctrl-C status 130, SIGTERM 143.

    So does a disk that is full or not to be written to.
    """
    logging.raiseExceptions = False  # a line that a full disk does not take is no reason for a page of them
    try:
        raise_interrupts()
        return main()
    except UserError as error:
        if not logging.getLogger("d2kd").handlers:
            setup_logger(name="d2kd")
        _tell(str(error))
        sys.exit(2)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f" {error.filename}" if error.filename else ""
        _tell(f"Cannot write{where}: {error.strerror}. Make room, or write to another folder.")
        sys.exit(2)
    except Terminated:
        sys.exit(143)
    except KeyboardInterrupt:
        sys.exit(130)


def _tell(message: str) -> None:
    logger.error("%s", message)
    if not comm.is_main_process():  # whose log goes to a file only
        time.sleep(_PATIENCE)
        print(f"Process {comm.get_rank()}: {message}", file=sys.stderr, flush=True)


def launch_tool(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Runs `main`, a function that can be pickled, by `run_tool` in as many processes as the arguments say.

    Ctrl-C and termination go to all of them, and their exit status becomes this process's. Processes that torchrun has
    started are as many as it says.
    """
    run_tool(lambda: _check_processes(args))
    joins_others = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))  # as torchrun sets them
    starts_others = args.num_gpus * args.num_machines > 1 and not joins_others
    if (starts_others or joins_others) and run_tool(lambda: _runs_on_cpu(args)):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # where there are GPUs, the runtime would choose NCCL
    if joins_others:
        with _joined_processes():
            _tool_process(main, args)
        return
    try:
        with _passing_signals_on() if starts_others else contextlib.nullcontext():
            launch(
                _tool_process,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(main, args),
            )
    except KeyboardInterrupt:  # before a process works
        sys.exit(130)
    except ProcessExitedException as error:  # which has told why
        if error.exit_code == 130:
            print("Interrupted.", file=sys.stderr, flush=True)
        sys.exit(error.exit_code if error.exit_code >= 0 else 128 - error.exit_code)


@contextlib.contextmanager
def _joined_processes() -> Iterator[None]:
    """Makes this process one of those that torchrun has started, which Detectron2's `launch` does not."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    comm.create_local_process_group(int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())))
    comm.synchronize()
    yield
    comm.synchronize()
    gc.collect()  # trainers and their hooks refer to each other: models would outlive the group that they talk through
    dist.destroy_process_group()


def _check_processes(args: argparse.Namespace) -> None:
    """Raises ConfigError for a number of processes or machines that there cannot be."""
    Setting(1, at_least=1).check("--num-gpus", args.num_gpus)
    Setting(1, at_least=1).check("--num-machines", args.num_machines)
    Setting(0, at_least=0, below=args.num_machines).check("--machine-rank", args.machine_rank)
    if args.num_machines > 1 and args.dist_url == "auto":
        raise ConfigError("--dist-url is auto; with several machines it must be tcp://HOST:PORT of the first one.")


def _runs_on_cpu(args: argparse.Namespace) -> bool:
    cfg = load_config(args.config_file, command_line_options(args), args.imports, [])
    return bool(cfg.MODEL.DEVICE == "cpu")


@contextlib.contextmanager
def _passing_signals_on() -> Iterator[None]:
    def pass_on(number: int, frame: Any) -> None:
        for process in multiprocessing.active_children():
            if process.pid is not None:
                os.kill(process.pid, number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with held_back_in_new_processes(pass_on):
            yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _tool_process(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    return run_tool(lambda: main(args))
