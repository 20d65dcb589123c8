"""Arguments of the programs: those of Detectron2's trainings, and d2kd's. Nothing here takes time to import."""

import argparse
import os
import sys
from collections.abc import Iterable
from typing import Any

from d2kd.errors import ConfigError


def run_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Returns a parser with the arguments of Detectron2's `default_argument_parser`.

    They are written anew, since importing those takes as long as importing PyTorch does; a test holds them equal.

    Args:
        description: what the program does; %(prog)s in it is its name.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=_EXAMPLES.format(program=os.path.basename(sys.argv[0])),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML of the model and its training")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR, if any")
    parser.add_argument("--eval-only", action="store_true", help="evaluate only")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes on *each machine*")
    parser.add_argument("--num-machines", type=int, default=1, help="how many machines take part")
    parser.add_argument("--machine-rank", type=int, default=0, help="which of them this is, from 0")
    parser.add_argument(
        "--dist-url", default="auto", help="where processes meet: tcp://HOST:PORT, or auto on a single machine"
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="changes to the YAML, behind all flags: KEY VALUE KEY VALUE ..."
    )
    return parser


_EXAMPLES = """
Examples:
  one process           {program} --config-file my.yaml
  four GPUs             {program} --config-file my.yaml --num-gpus 4
  other settings        {program} --config-file my.yaml MODEL.WEIGHTS weights.pth SOLVER.BASE_LR 0.001
  two machines, 8 GPUs  {program} --config-file my.yaml --num-gpus 4 --num-machines 2 \\
                          --machine-rank 0|1 --dist-url tcp://FIRST-MACHINE:PORT
"""


def argument_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Returns Detectron2's arguments and those that turn any configuration into a distillation run."""
    parser = run_parser(description)
    group = parser.add_argument_group("distillation")
    group.add_argument("--teacher-config", metavar="FILE", help="YAML of the teacher (DISTILL.TEACHER.CONFIG_FILE)")
    group.add_argument("--teacher-weights", metavar="FILE", help="checkpoint of the teacher (DISTILL.TEACHER.WEIGHTS)")
    group.add_argument("--method", metavar="NAME[,NAME]", help="methods to distil with (DISTILL.METHODS)")
    group.add_argument(
        "--eval-teacher", action="store_true", help="evaluate the teacher; with --eval-only, teacher and student"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="build, load and run one batch, print what would be trained, and write nothing",
    )
    add_run_arguments(parser)
    return parser


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--overwrite` and `--import`, which every training takes."""
    parser.add_argument(
        "--overwrite", action="store_true", help="remove what another run has left in OUTPUT_DIR, and start anew"
    )
    add_import_argument(parser)


def add_import_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--import`, for methods, architectures, backbones, ... of one's own."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="FILE.py",
        help="a Python file (or module) that registers methods, architectures, ... (DISTILL.IMPORTS); may be repeated",
    )


def command_line_options(args: argparse.Namespace) -> list[str]:
    """Returns the changes to the configuration that a command line asks for, ["KEY", "value", ...].

    Raises:
        ConfigError: a flag is empty.
    """
    changes = [o for o in args.opts if o != "--"]
    for flag, key, value in (
        ("--teacher-config", "DISTILL.TEACHER.CONFIG_FILE", args.teacher_config),
        ("--teacher-weights", "DISTILL.TEACHER.WEIGHTS", args.teacher_weights),
        ("--method", "DISTILL.METHODS", args.method),
    ):
        if value is not None:
            if not value.strip():
                raise ConfigError(f"{flag} is {value!r}; it must not be empty.")
            changes += [key, repr(value.split(",")) if flag == "--method" else value]
    return changes


def check_no_flags(options: Iterable[Any]) -> None:
    """
    Raises:
        ConfigError: there are flags among the changes to the configuration.
    """
    flags = [str(o) for o in options if str(o).startswith("--")]
    if flags:
        raise ConfigError(f"{' '.join(flags)}: flags go before the first KEY VALUE.")
