"""Compares finished runs: writes report.html to look at, report.md, report.json, and pictures of what models find.

%(prog)s --dataset photo_digits_val --output output/report --run teacher=output/teacher \\
    --run baseline=output/baseline --run distilled=output/distilled
%(prog)s --output output/report --run 'baseline=output/baseline/seed*' --run 'distilled=output/distilled/seed*'
"""

import argparse
import glob
import os
import shlex
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from d2kd.evaluation.report import ModelResult


def argument_parser() -> argparse.ArgumentParser:
    """The arguments of this program."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument(
        "--run",
        action="append",
        required=True,
        nargs="+",
        metavar="NAME=DIR",
        help="OUTPUT_DIR of a finished run of train_net.py, once for each run; gains and gap closure are computed from "
        "the names teacher, baseline, inherit and distilled, and any other name gets its row and curve only; of a run "
        "for several seeds all folders, NAME=DIR DIR ..., or a pattern, 'NAME=DIR/seed*'",
    )
    parser.add_argument(
        "--label",
        action="append",
        default=[],
        type=named_value,
        metavar="NAME=TEXT",
        help="what the report calls this run",
    )
    parser.add_argument("--dataset", metavar="NAME", help="registered dataset whose images are drawn")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the report goes")
    parser.add_argument("--title", default="Comparison", help="its heading")
    parser.add_argument("--statement", default="", help="what the comparison shows and what not, in your words")
    parser.add_argument(
        "--task",
        help="which metrics to compare: bbox, segm, sem_seg, classification, ... (default: what the first run was "
        "evaluated on, bbox where there are several)",
    )
    parser.add_argument(
        "--images",
        type=int,
        help="how many images to draw (default: 6; 12 for classifiers, and as many where they differ)",
    )
    parser.add_argument(
        "--drawings",
        type=int,
        default=0,
        metavar="N",
        help="draw the images N times with replacement, 500 for instance, to tell how sure a difference in AP is of "
        "which there is one seed (boxes and masks, with --dataset; some seconds a run for 1,000 images)",
    )
    parser.add_argument("--score-threshold", type=float, default=0.3, help="of drawn detections (default: 0.3)")
    return parser


def named_value(text: str) -> tuple[str, str]:
    """Splits "name=value"."""
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


def folders_of_runs(given: list[list[str]]) -> dict[str, list[str]]:
    """The folders of `--run NAME=DIR DIR ...`, by name; a DIR may be a pattern that stands for some.

    Raises:
        ArgumentTypeError: one has no name, or a pattern stands for no folder.
    """
    runs: dict[str, list[str]] = {}
    for first, *more in given:
        name, directory = named_value(first)
        for pattern in (directory, *more):
            found = [pattern]
            if any(letter in pattern for letter in "*?[") and not os.path.exists(pattern):
                found = sorted(path for path in glob.glob(pattern) if os.path.isdir(path))
            if not found:
                raise argparse.ArgumentTypeError(f"argument --run: no folder is named as {pattern!r}")
            runs.setdefault(name, []).extend(found)
    return runs


def make_dataset_known(dataset_name: str, models: list["ModelResult"]) -> None:
    """Registers a dataset that is named in the configuration (`DATASETS.REGISTER`) of a run or of its evaluation.

    Raises:
        DatasetError: no such dataset is registered, nor named in a configuration.
    """
    from d2kd.data.datasets import DatasetError, register_datasets
    from d2kd.engine import load_config
    from detectron2.data import DatasetCatalog

    configs = [config for model in models if (config := model.config_file)]
    configs += [os.path.join(os.path.dirname(config), "evaluation", "config.yaml") for config in configs]
    for config in filter(os.path.isfile, configs):
        if dataset_name not in DatasetCatalog.list():
            register_datasets(load_config(config, trains=False))
    if dataset_name not in DatasetCatalog.list():
        raise DatasetError(f"--dataset {dataset_name}: it is not registered, and no run's config.yaml names it.")


def main(args: argparse.Namespace, command: str) -> None:
    """Writes the report, and in it `command`, the line that made it.

    Raises:
        ResultError: a run has no result, or none of the task; runs were evaluated on different datasets; or what should
            be seeds of one differ in more than that.
        DatasetError: see `make_dataset_known`.
        ConfigError: `--drawings` cannot be done.
        UserError: `--output` cannot be written.
    """
    from d2kd.engine import log_runtime
    from d2kd.errors import ConfigError
    from d2kd.evaluation.report import write_report
    from d2kd.evaluation.results import choose_task
    from d2kd.evaluation.seeds import load_seeds
    from d2kd.files import require_writable
    from detectron2.utils.logger import setup_logger

    setup_logger(name="d2kd")
    log_runtime()
    if args.drawings and not args.dataset:
        raise ConfigError("--drawings needs --dataset: whose images are to be drawn.")
    if args.drawings < 0:
        raise ConfigError(f"--drawings is {args.drawings}; it must be at least 0.")
    require_writable("--output", args.output)
    labels = dict(args.label)
    first, (directory, *_) = next(iter(args.run.items()))
    task = args.task or choose_task(first, directory, args.dataset)
    models = {
        name: load_seeds(name, found, labels.get(name, ""), args.dataset, task) for name, found in args.run.items()
    }
    if args.dataset:
        make_dataset_known(args.dataset, list(models.values()))
    write_report(
        args.output,
        models,
        dataset_name=args.dataset,
        title=args.title,
        statement=args.statement,
        commands=[command],
        task=task,
        num_images=args.images,
        score_threshold=args.score_threshold,
        drawings=args.drawings,
    )


def run(arguments: list[str] | None = None) -> None:
    """Runs the command with its arguments, by default those of the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argument_parser()
    args = parser.parse_args(arguments)
    try:
        args.run = folders_of_runs(args.run)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    program = f"python {sys.argv[0]}" if sys.argv[0].endswith(".py") else sys.argv[0]
    from d2kd.engine import run_tool

    run_tool(lambda: main(args, f"{program} {shlex.join(arguments)}"))
