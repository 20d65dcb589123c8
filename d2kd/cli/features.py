"""Draws feature maps of a teacher and its student, before and after the training, side by side over images.

%(prog)s --weights output/distilled/model_final.pth
%(prog)s --config-file student.yaml --weights model_final.pth --images photographs --taps p3 p4 --output seen

A row for each tap: the mean over the channels, the first three principal components in common colors, and how far the
student is from the teacher. Numbers (cosine, CKA, difference) go to features.json.
"""

import argparse
import logging
import os
from typing import TYPE_CHECKING

from d2kd.arguments import add_import_argument, command_line_options
from d2kd.errors import ConfigError

from .mistakes import stop_at_mistakes

if TYPE_CHECKING:
    from d2kd.prediction import ImageFile
    from d2kd.prediction.features import FeatureSummary
    from detectron2.config import CfgNode

logger = logging.getLogger(__name__)

#: Images that are shown by default, and the most.
USUAL, MOST = 6, 50


def argument_parser() -> argparse.ArgumentParser:
    """The arguments of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="", metavar="FILE", help="checkpoint of the trained student")
    parser.add_argument(
        "--config-file", default="", metavar="FILE", help="student's YAML (default: config.yaml beside the weights)"
    )
    parser.add_argument("--teacher-config", metavar="FILE", help="YAML of the teacher (DISTILL.TEACHER.CONFIG_FILE)")
    parser.add_argument("--teacher-weights", metavar="FILE", help="its checkpoint (DISTILL.TEACHER.WEIGHTS)")
    parser.add_argument(
        "--before",
        default="",
        metavar="FILE",
        help="checkpoint of the student to show beside the trained one (default: the weights that a training with this "
        "YAML starts from)",
    )
    parser.add_argument("--no-before", action="store_true", help="show the trained student only")
    parser.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="INPUT",
        help="images, folders or globs (default: some of the first dataset of DATASETS.TEST, evenly spread)",
    )
    parser.add_argument(
        "--number",
        type=int,
        default=USUAL,
        help=f"of images to show (default: {USUAL}; {MOST} at most)",
    )
    parser.add_argument(
        "--taps",
        nargs="+",
        default=[],
        metavar="TAP",
        help="maps to compare: p3, res4, STUDENT=TEACHER, ... (default: those of the methods, or what both backbones "
        "give)",
    )
    parser.add_argument(
        "--output", default="", metavar="DIR", help="where to write (default: the folder features beside the weights)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are in --output")
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1, ... (MODEL.DEVICE)")
    add_import_argument(parser)
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="changes to the YAML, at the end"
    )
    parser.set_defaults(method=None)
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Checks what needs no imports, and finds configuration and folder beside the weights.

    Raises:
        ConfigError: an argument cannot be used.
    """
    if not args.weights:
        raise ConfigError("--weights is missing: give the checkpoint of the trained student (model_final.pth).")
    for flag, path in (("--weights", args.weights), ("--before", args.before)):
        if path and "://" not in path and not os.path.isfile(path):
            raise ConfigError(f"{flag} is {path!r}: there is no such file.")
    if args.before and args.no_before:
        raise ConfigError("--before and --no-before exclude each other.")
    if not 1 <= args.number <= MOST:
        raise ConfigError(f"--number is {args.number}; it must be from 1 to {MOST}.")
    folder = os.path.dirname(args.weights)
    if not args.config_file:
        args.config_file = os.path.join(folder, "config.yaml")
        if not os.path.isfile(args.config_file):
            raise ConfigError("--config-file is missing: give the student's YAML (there is no config.yaml beside it).")
    if not args.output:
        if "://" in args.weights:
            raise ConfigError("--output is missing: name a folder.")
        args.output = os.path.join(folder, "features")


def main(args: argparse.Namespace) -> "FeatureSummary":
    """Compares and draws; returns what was done.

    Raises:
        UserError: the configuration, a checkpoint, the images, the taps or the folder cannot be used.
    """
    check_arguments(args)
    from d2kd.engine import load_config, log_runtime
    from d2kd.engine.compared_models import require_teacher
    from d2kd.prediction.features import choose_images, claimed
    from d2kd.prediction.files import require_free
    from detectron2.utils.logger import setup_logger

    setup_logger(name="d2kd")
    require_free(args.output, args.overwrite)
    device = ["MODEL.DEVICE", args.device] if args.device else []
    options = command_line_options(argparse.Namespace(**{**vars(args), "opts": [*args.opts, *device]}))
    cfg = load_config(args.config_file, options, args.imports, trains=False)
    require_teacher(cfg)
    images = choose_images(cfg, args.images, args.number, args.output)
    log_runtime(cfg.MODEL.DEVICE)
    with claimed(args.output):
        summary = _compare(args, cfg, images)
    tell(summary, args.output)
    return summary


def _compare(args: argparse.Namespace, cfg: "CfgNode", images: "list[ImageFile]") -> "FeatureSummary":
    from d2kd.engine.compared_models import load_compared_models
    from d2kd.modeling.feature_recording import TEACHER, FeatureRecorder, named_pairs, pairs_of_distillers
    from d2kd.modeling.taps import image_side
    from d2kd.prediction.features import compare_features

    models = load_compared_models(cfg, args.weights, args.before, not args.no_before)
    student = models.students["after"]
    pairs, left_out = pairs_of_distillers(models.distillers)
    if args.taps or not pairs:
        vectors = {} if args.taps else left_out
        pairs, left_out = named_pairs(student, models.teacher.model, args.taps, pairs, image_side(cfg))
        left_out = {**vectors, **left_out}
    recorder = FeatureRecorder(models.teacher, models.students, pairs)
    recorder.left_out.update(left_out)
    columns = {TEACHER: "teacher", **{role: f"student {role}" for role in models.students}}
    columns = columns if models.before else {TEACHER: "teacher", "after": "student"}
    about = {
        "weights": args.weights,
        "before": models.before or None,
        "teacher": cfg.DISTILL.TEACHER.WEIGHTS or cfg.DISTILL.TEACHER.CONFIG_FILE,
        "config_file": args.config_file,
    }
    notes = [
        f"Student after: {args.weights}; before: {models.before}." if models.before else f"Student: {args.weights}."
    ]
    return compare_features(cfg, recorder, images, args.output, columns=columns, about=about, notes=notes)


def tell(summary: "FeatureSummary", output: str) -> None:
    """Logs what was found."""
    for tap in summary.taps:
        for role, numbers in tap.numbers.items():
            logger.info(
                "%s, student %s: cosine %.3f, CKA %.3f, difference %.3f",
                tap.pair.name,
                role,
                numbers.cosine,
                numbers.cka,
                numbers.difference,
            )
    logger.info("%d pictures of %d taps and features.json: %s", len(summary.pictures), len(summary.taps), output)
    if summary.skipped:
        logger.warning("%d image(s) could not be read and were skipped; named above.", len(summary.skipped))


def run(arguments: list[str] | None = None) -> None:
    """Runs the command with its arguments, by default those of the command line."""
    args = argument_parser().parse_args(arguments)
    stop_at_mistakes(args, check_arguments)
    from d2kd.engine import run_tool

    run_tool(lambda: main(args))
