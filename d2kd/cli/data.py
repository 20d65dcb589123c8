"""Looks at the datasets of a configuration before anything is trained on them.

%(prog)s check --config-file student.yaml
%(prog)s show --config-file student.yaml --output sheet.png

`check` decodes all images of DATASETS.TRAIN and TEST, and prints counts of each class, sizes, and what looks like a
mistake; what a training would refuse ends it with status 2. `show` draws images of DATASETS.TRAIN as they are trained
on, augmented, with their boxes, masks, label maps or classes.
"""

import argparse
import logging
from typing import TYPE_CHECKING

from d2kd.arguments import add_import_argument

from .mistakes import stop_at_mistakes

if TYPE_CHECKING:
    from detectron2.config import CfgNode

logger = logging.getLogger(__name__)


def argument_parser() -> argparse.ArgumentParser:
    """The arguments of this program."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    commands = parser.add_subparsers(dest="command", required=True, metavar="check|show")
    check = commands.add_parser("check", help="print counts, sizes, and what looks like a mistake")
    check.add_argument(
        "--quick",
        action="store_true",
        help="do not decode images, look at their first and last bytes only; of more than 5,000 images or label maps "
        "at some, evenly spread",
    )
    show = commands.add_parser("show", help="draw images as they are trained on")
    show.add_argument("--dataset", metavar="NAME", help="which one to draw (default: those of DATASETS.TRAIN)")
    show.add_argument("--images", type=int, default=12, help="how many (default: 12)")
    show.add_argument("--output", default="data.png", metavar="FILE", help="picture to write (default: data.png)")
    for command in (check, show):
        command.add_argument("--config-file", required=True, metavar="FILE", help="YAML of a run")
        add_import_argument(command)
        command.add_argument("opts", nargs="*", metavar="KEY VALUE", help="changes to the configuration")
    return parser


def check(cfg: "CfgNode", quick: bool = False) -> None:
    """Prints what the datasets hold; `quick` does not decode images.

    Raises:
        DatasetError: the first thing that a training would refuse.
    """
    from d2kd.data.inspection import inspect_datasets

    reports, shared = inspect_datasets(cfg, quick)
    print("\n\n".join(report.text() for report in reports))
    if shared:
        print("\n" + "\n".join(shared))


def show(cfg: "CfgNode", images: int, output: str) -> None:
    """Draws the first images of a training.

    Args:
        cfg: of the training.
        images: how many.
        output: the picture to write.

    Raises:
        UserError: an argument cannot be used.
        DatasetError: the data cannot be trained on.
    """
    import cv2

    from d2kd.data.datasets import check_datasets
    from d2kd.data.loader import build_train_loader
    from d2kd.errors import ConfigError
    from d2kd.files import replacing, require_writable
    from d2kd.visualization import input_sheet
    from detectron2.data import MetadataCatalog

    if images < 1 or not output.lower().endswith((".png", ".jpg")):
        raise ConfigError(f"--images must be at least 1, and --output a .png or .jpg: {images}, {output!r}.")
    require_writable("--output", output, is_file=True)
    cfg.DATALOADER.NUM_WORKERS = 0
    check_datasets(cfg, ("TRAIN",))
    inputs = []
    for batch in build_train_loader(cfg):
        inputs += batch
        if len(inputs) >= images:
            break
    meta = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    sheet = input_sheet(
        inputs[:images], cfg.INPUT.FORMAT, meta.get("thing_classes") or (), meta.get("stuff_classes") or ()
    )
    with replacing(output) as temporary:
        if not cv2.imwrite(str(temporary), sheet):
            raise OSError(f"{temporary} cannot be written")
    logger.info("Wrote %d images of %s to %s", len(inputs[:images]), ", ".join(cfg.DATASETS.TRAIN), output)


def main(args: argparse.Namespace) -> None:
    """Checks or shows."""
    from d2kd.data.datasets import register_datasets
    from d2kd.engine import load_config
    from detectron2.utils.logger import setup_logger

    cfg = load_config(args.config_file, args.opts, args.imports, trains=False)
    setup_logger(name="d2kd")
    register_datasets(cfg)
    if args.command == "check":
        check(cfg, args.quick)
        return
    if args.dataset:
        cfg.DATASETS.TRAIN = [args.dataset]
    show(cfg, args.images, args.output)


def run(arguments: list[str] | None = None) -> None:
    """Runs the command with its arguments, by default those of the command line."""
    args = argument_parser().parse_args(arguments)
    stop_at_mistakes(args)
    from d2kd.engine import run_tool

    run_tool(lambda: main(args))
