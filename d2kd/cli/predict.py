"""Predicts on images, folders, globs, videos or a camera, and writes pictures, a table and COCO's results.

%(prog)s photographs --weights output/distilled/model_final.pth
%(prog)s 'photographs/*.jpg' clip.mp4 --config-file student.yaml --weights student.pth --output found
%(prog)s photographs --weights student.onnx
%(prog)s --camera 0 --config-file student.yaml --weights student.pth --max-frames 500
"""

import argparse
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from d2kd.arguments import add_import_argument
from d2kd.errors import ConfigError
from d2kd.files import is_exported

from .mistakes import stop_at_mistakes

if TYPE_CHECKING:
    from d2kd.prediction import Summary

logger = logging.getLogger(__name__)


def argument_parser() -> argparse.ArgumentParser:
    """The arguments of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="image, folder, glob or video")
    parser.add_argument(
        "--camera", type=int, metavar="NUMBER", help="predict on a camera, until Ctrl-C; the first is 0"
    )
    parser.add_argument(
        "--config-file", default="", metavar="FILE", help="student's YAML (default: config.yaml beside the weights)"
    )
    parser.add_argument(
        "--weights",
        default="",
        metavar="FILE",
        help="its checkpoint (MODEL.WEIGHTS), or a file that d2kd export has written, which needs no YAML",
    )
    parser.add_argument("--output", default="predictions", metavar="DIR", help="where to write (default: predictions)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are in --output")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        help="lowest score of detections in pictures and table; COCO's results have all (default: 0.5)",
    )
    parser.add_argument("--batch", type=int, default=1, help="images the model gets at once (default: 1)")
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1, ... (MODEL.DEVICE)")
    parser.add_argument("--max-frames", type=int, metavar="COUNT", help="of each video, and of the camera")
    parser.add_argument("--no-pictures", dest="pictures", action="store_false", help="write the files of results only")
    add_import_argument(parser)
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="changes to the YAML, at the end"
    )
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Checks what needs no imports, and finds the configuration beside the weights.

    Raises:
        ConfigError: an argument cannot be used.
    """
    if is_exported(args.weights):
        if args.config_file or args.opts:
            raise ConfigError(f"--weights {args.weights} is an exported file, which has its configuration inside.")
    elif not args.config_file:
        beside = os.path.join(os.path.dirname(args.weights), "config.yaml")
        if not (args.weights and os.path.isfile(beside)):
            raise ConfigError("--config-file is missing: give the student's YAML (there is no config.yaml beside it).")
        args.config_file = beside
    if not args.inputs and args.camera is None:
        raise ConfigError("There is nothing to predict on: give images, folders, globs or videos, or --camera 0.")
    if args.camera is not None and args.camera < 0:
        raise ConfigError(f"--camera is {args.camera}; cameras are numbered from 0.")
    for flag, value in (("--batch", args.batch), ("--max-frames", args.max_frames)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} is {value}; it must be at least 1.")
    if not 0 <= args.threshold <= 1:
        raise ConfigError(f"--threshold is {args.threshold}; scores go from 0 to 1.")
    if args.weights and "://" not in args.weights and not os.path.isfile(args.weights):
        raise ConfigError(f"--weights is {args.weights!r}: there is no such file.")


def main(args: argparse.Namespace) -> "Summary":
    """Predicts and writes; returns what was done.

    Raises:
        UserError: the inputs, the configuration, the weights or the folder cannot be used.
    """
    check_arguments(args)
    from d2kd.engine import load_config, log_runtime
    from d2kd.prediction import Predictor, find_inputs, predict_files
    from d2kd.prediction.files import require_free
    from detectron2.utils.logger import setup_logger

    setup_logger(name="d2kd")
    images, videos = find_inputs(args.inputs, args.camera, args.output)
    require_free(args.output, args.overwrite)
    if is_exported(args.weights):
        predictor = Predictor.from_file(args.weights, args.device or "cpu")
    else:
        device = ["MODEL.DEVICE", args.device] if args.device else []
        cfg = load_config(args.config_file, [*args.opts, *device], args.imports, trains=False)
        log_runtime(cfg.MODEL.DEVICE)
        predictor = Predictor.from_config(cfg, args.weights)
    summary = predict_files(
        predictor,
        images,
        videos,
        args.output,
        threshold=args.threshold,
        batch_size=args.batch,
        pictures=args.pictures,
        max_frames=args.max_frames,
        overwrite=args.overwrite,
    )
    tell(summary, args.output)
    if summary.interrupted and args.camera is None:
        sys.exit(130)
    return summary


def tell(summary: "Summary", output: str) -> None:
    """Logs what was done."""
    done = [f"{n:,} {what}" for n, what in ((summary.images, "images"), (summary.frames, "frames")) if n]
    total = summary.images + summary.frames
    logger.info(
        "%s%s in %.1f s (%.1f a second, with reading and drawing): %s",
        "Stopped early: " if summary.interrupted else "",
        " and ".join(done),
        summary.seconds,
        total / max(summary.seconds, 1e-9),
        output,
    )
    if summary.skipped:
        logger.warning("%d images could not be read and were skipped; they are named above.", len(summary.skipped))


def run(arguments: list[str] | None = None) -> None:
    """Runs the command with its arguments, by default those of the command line."""
    args = argument_parser().parse_intermixed_args(arguments)
    stop_at_mistakes(args, check_arguments)
    from d2kd.engine import run_tool

    signal.signal(signal.SIGTERM, _end)
    run_tool(lambda: main(args))


def _end(number: int, frame: Any) -> None:
    """Temporary files are removed on the way out."""
    sys.exit(128 + number)
