"""Measures what models cost: latency, throughput, memory, parameters, multiply-adds; of runs and of exported files.

%(prog)s teacher=output/teacher output/distilled output/distilled/student.onnx --output output/cost
%(prog)s --config-file student.yaml --weights student.pth
"""

import argparse
import os
import shlex
import sys
from typing import Any

from d2kd.arguments import add_import_argument
from d2kd.errors import ConfigError, UserError

from .mistakes import stop_at_mistakes


def argument_parser() -> argparse.ArgumentParser:
    """The arguments of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models",
        nargs="*",
        metavar="[NAME=]PATH",
        help="folder of a finished run, or a checkpoint in it, or a file of d2kd export; times are compared with the "
        "first. A file in the folder of a run has its metric",
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="a model by its YAML, and its teacher")
    parser.add_argument("--weights", default="", metavar="FILE", help="its checkpoint (MODEL.WEIGHTS)")
    parser.add_argument(
        "--output", metavar="DIR", help="write benchmark.md, .json and .png there, and benchmark.json beside each run"
    )
    parser.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="INPUT",
        help="images, folders (default: of the first run's test set)",
    )
    parser.add_argument("--number", type=int, default=8, help="images, at most (default: 8)")
    parser.add_argument("--rounds", type=int, default=10, help="how often every model runs all images (default: 10)")
    parser.add_argument("--batch", type=int, default=8, help="images at once, for the throughput (default: 8)")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU (default: as many as there are cores)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    add_import_argument(parser)
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="changes to the YAML, at the end",
    )
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: an argument cannot be used.
    """
    if not (args.models or args.config_file):
        raise ConfigError("There is nothing to measure: name folders of runs or exported files, or --config-file.")
    if args.weights and not args.config_file:
        raise ConfigError("--weights needs --config-file, the YAML that they belong to; or name the folder of a run.")
    for flag in ("number", "rounds", "batch"):
        if getattr(args, flag) < 1:
            raise ConfigError(f"--{flag} is {getattr(args, flag)}; it must be at least 1.")
    if args.threads < 0:
        raise ConfigError(f"--threads is {args.threads}; it must be at least 1, or 0 for all cores.")


def main(args: argparse.Namespace, command: str) -> Any:
    """Measures, writes, and prints the table; returns the measurements.

    Raises:
        UserError: a model, an image or the folder cannot be used.
    """
    check_arguments(args)
    from d2kd.benchmarking import Settings, benchmark_table, find_subjects, measure, write_results
    from d2kd.prediction.files import require_free
    from detectron2.utils.logger import setup_logger

    setup_logger(name="d2kd")
    if args.output:
        require_free(args.output, overwrite=True)
    pairs = [(name if found else "", path if found else name) for name, found, path in map(_split, args.models)]
    subjects = [*_of_config(args), *find_subjects(pairs, args.opts, args.imports or ())]
    images = _images(args, subjects)
    settings = Settings(args.device, args.threads, args.batch, args.rounds, images=images)
    found = measure(subjects, settings)
    if args.output:
        write_results(args.output, found, settings, command)
    print(benchmark_table(found, "simple"))
    return found


def _split(text: str) -> tuple[str, str, str]:
    """NAME=PATH, unless there is a file of that name."""
    return (text, "", "") if os.path.exists(text) else text.partition("=")


def _of_config(args: argparse.Namespace) -> list[Any]:
    """The model of --config-file, and its teacher."""
    if not args.config_file:
        return []
    from d2kd.benchmarking import Subject, SubjectError
    from d2kd.engine import load_config

    cfg = load_config(args.config_file, args.opts, args.imports, trains=False)
    weights = args.weights or cfg.MODEL.WEIGHTS
    if not os.path.isfile(weights):
        raise SubjectError(f"--weights is {weights!r}: there is no such file.")
    imports = tuple(args.imports or ())
    student = Subject("student", weights, args.config_file, tuple(args.opts), imports)
    teacher = cfg.DISTILL.TEACHER
    if not (teacher.CONFIG_FILE and os.path.isfile(teacher.WEIGHTS)):
        return [student]
    return [Subject("teacher", teacher.WEIGHTS, teacher.CONFIG_FILE, tuple(teacher.OPTS), imports), student]


def _images(args: argparse.Namespace, subjects: list[Any]) -> list[Any]:
    """Those of --images, of the first test set that is here, or drawn ones."""
    import logging

    from d2kd.engine import load_config
    from d2kd.export.images import drawn_pictures
    from d2kd.prediction import find_inputs
    from detectron2.data import DatasetCatalog

    logger = logging.getLogger("d2kd.cli.benchmark")
    if args.images:
        return [image.path for image in find_inputs(args.images)[0][: args.number]]
    for subject in subjects:
        if subject.exported:
            continue
        cfg = load_config(subject.config_file, [*subject.options], subject.imports, trains=False)
        for name in cfg.DATASETS.TEST:
            try:
                records = DatasetCatalog.get(name)
            except (UserError, OSError, KeyError):
                continue
            step = max(len(records) // args.number, 1)
            files = [record["file_name"] for record in records[::step][: args.number]]
            if all(os.path.isfile(file) for file in files):
                logger.info("Images: %d of %s.", len(files), name)
                return files
    logger.warning("No test set is here: drawn images are taken; with --images FILES the times are those of yours.")
    return drawn_pictures(args.number)


def run(arguments: list[str] | None = None) -> None:
    """Runs the command with its arguments, by default those of the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = argument_parser().parse_args(arguments)
    stop_at_mistakes(args, check_arguments)
    from d2kd.engine import run_tool

    run_tool(lambda: main(args, f"d2kd benchmark {shlex.join(arguments)}"))
