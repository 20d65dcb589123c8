#!/usr/bin/env python
"""Compares finished runs: writes report.md, report.json, curves and pictures of detections.

python tools/report.py --dataset photo_digits_val --output output/report --run teacher=output/teacher \\
    --run baseline=output/baseline --run distilled=output/distilled
"""

import argparse
import logging
import shlex
import sys

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.data.datasets import register_datasets
from d2kd.engine import load_config, log_runtime
from d2kd.engine.launching import USER_ERRORS
from d2kd.evaluation.report import ModelResult, load_result, write_report
from detectron2.data import DatasetCatalog
from detectron2.utils.logger import setup_logger

logger = logging.getLogger("d2kd.tools.report")


def argument_parser() -> argparse.ArgumentParser:
    """The arguments of this program."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument(
        "--run",
        action="append",
        required=True,
        type=named_value,
        metavar="NAME=DIR",
        help="OUTPUT_DIR of a finished run of train_net.py, once for each run; gains and gap closure are computed from "
        "the names teacher, baseline, inherit and distilled, and any other name gets its row and curve only",
    )
    parser.add_argument(
        "--label",
        action="append",
        default=[],
        type=named_value,
        metavar="NAME=TEXT",
        help="what the report calls this run",
    )
    parser.add_argument("--dataset", metavar="NAME", help="registered dataset to draw detections on")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the report goes")
    parser.add_argument("--title", default="Comparison", help="its heading")
    parser.add_argument("--statement", default="", help="what the comparison shows and what not, in your words")
    parser.add_argument("--task", default="bbox", help="which metrics to compare (default: bbox)")
    parser.add_argument("--images", type=int, default=6, help="how many images to draw (default: 6)")
    parser.add_argument("--score-threshold", type=float, default=0.3, help="of drawn detections (default: 0.3)")
    return parser


def named_value(text: str) -> tuple[str, str]:
    """Splits "name=value"."""
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


def make_dataset_known(dataset_name: str, models: list[ModelResult]) -> None:
    """Registers a dataset that is named in the configuration of one of the runs (`DATASETS.REGISTER`).

    Raises:
        ValueError: no such dataset is registered, nor named in a configuration.
    """
    for model in models:
        if dataset_name not in DatasetCatalog.list() and model.config_file:
            register_datasets(load_config(model.config_file))
    if dataset_name not in DatasetCatalog.list():
        raise ValueError(f"--dataset {dataset_name}: it is not registered, and no run's config.yaml names it")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    args = argument_parser().parse_args(arguments)
    setup_logger(name="d2kd")
    log_runtime()
    labels = dict(args.label)
    try:
        models = {
            name: load_result(name, directory, labels.get(name, ""), args.dataset, args.task)
            for name, directory in args.run
        }
        if args.dataset:
            make_dataset_known(args.dataset, list(models.values()))
        write_report(
            args.output,
            models,
            dataset_name=args.dataset,
            title=args.title,
            statement=args.statement,
            commands=[shlex.join(["python", "tools/report.py", *(arguments or sys.argv[1:])])],
            task=args.task,
            num_images=args.images,
            score_threshold=args.score_threshold,
        )
    except (FileNotFoundError, ValueError, *USER_ERRORS) as error:
        logger.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
