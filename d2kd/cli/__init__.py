"""The console program `d2kd`, and its commands, which the programs in tools/ run as well.

Help, lists and typing errors answer at once: a command reads its arguments, then imports what takes time (PyTorch, and
all that needs it) inside its functions.
"""

import importlib
import io
import sys
from typing import NamedTuple

import d2kd
from d2kd.errors import did_you_mean
from d2kd.interrupts import ending_at_interrupts


class Command(NamedTuple):
    """A command: the module here whose `run` takes its arguments, those that go before them, and a line of help."""

    module: str
    help: str
    first: tuple[str, ...] = ()


COMMANDS = {
    "train": Command("train", "train a model, by distillation where a teacher is given"),
    "eval": Command("train", "evaluate a model, with --eval-teacher beside its teacher", ("--eval-only",)),
    "data": Command("data", "check the datasets of a configuration, or show them as they are trained on"),
    "cache": Command("cache", "keep a teacher's features on the disk: build, describe or empty a cache"),
    "learn-tokens": Command("learn_tokens", "learn the receptive tokens of a teacher, for ReceptiveTokens"),
    "masking-gate": Command("masking_gate", "measure what MaskedTeacher does to a teacher's features, and its time"),
    "predict": Command("predict", "predict on images, folders, videos or a camera: pictures, a table, COCO's results"),
    "features": Command("features", "draw features of teacher and student, before and after the training, over images"),
    "export": Command("export_student", "write the student of a training checkpoint as a plain checkpoint"),
    "benchmark": Command("benchmark", "measure what models and exported files cost: time, memory, parameters"),
    "list": Command("listing", "list methods, recipes, architectures, backbones, heads or passes, with a line of help"),
    "report": Command("report", "compare finished runs: tables, curves and pictures"),
}


def usage() -> str:
    """Returns what `d2kd --help` prints."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: d2kd [-h] [--version] COMMAND ...",
            "",
            "Knowledge distillation for classification, detection and segmentation on Detectron2.",
            "",
            "commands:",
            *(f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()),
            "",
            "`d2kd COMMAND --help` lists the arguments of a command.",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs a command, by default that of the command line; returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be nothing that can be printed
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"d2kd {d2kd.__version__}")
        return 0
    if name not in COMMANDS:
        print(_unknown(name) if name else usage(), file=sys.stderr)
        return 2
    command = COMMANDS[name]
    sys.argv[0] = f"d2kd {name}"  # what usage lines and examples call the program
    with ending_at_interrupts():
        importlib.import_module(f"d2kd.cli.{command.module}").run([*command.first, *rest])
    return 0


def _unknown(name: str) -> str:
    hint = did_you_mean(name, COMMANDS, cutoff=0.6) or f" There are {', '.join(COMMANDS)}."
    return f"d2kd: {name!r} is not a command.{hint}"
