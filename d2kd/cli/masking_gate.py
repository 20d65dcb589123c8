"""Measures how much of a masked teacher's features is left, and what it costs, before any training.

%(prog)s --config-file recipe.yaml MODEL.WEIGHTS student.pth OUTPUT_DIR output/gate

For each share of the patches and each way to choose them (as the student looks, at random, objects first): the cosine
distance to the features of the whole teacher, and the time. Recommended is the smallest share whose distance is below
what a resize of the image by 10 %% does to the whole teacher. Writes masking.md, masking.json and masking.png.
"""

import argparse
import itertools
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from d2kd.arguments import add_import_argument
from d2kd.errors import ConfigError, UserError
from d2kd.files import finite, replacing, require_writable, write_json

from .mistakes import stop_at_mistakes

if TYPE_CHECKING:
    from d2kd.modeling.teacher_passes.drift import Gate
    from detectron2.config import CfgNode

logger = logging.getLogger(__name__)


def argument_parser() -> argparse.ArgumentParser:
    """The arguments of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML of a run with a masked teacher")
    parser.add_argument("--images", type=int, default=500, help="of DATASETS.TRAIN to look at, at most (default: 500)")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.75, 0.5, 0.35, 0.25], help="KEEP_RATIOs to try")
    add_import_argument(parser)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="changes to the configuration")
    return parser


def main(args: argparse.Namespace) -> "Gate":
    """Measures and writes; returns what was measured.

    Raises:
        UserError: the configuration has no masked teacher, or anything in it is wrong.
    """
    from d2kd.data.datasets import check_datasets, register_datasets
    from d2kd.engine import DistillTrainer, load_config, log_runtime
    from d2kd.modeling import build_distilled_model, is_distillation, load_strictly
    from d2kd.modeling.teacher_passes.drift import measure_drift
    from detectron2.utils.logger import setup_logger

    wrong = [ratio for ratio in args.ratios if not 0 < ratio <= 1]
    if wrong or args.images < 1:
        raise UserError(f"--ratios must be above 0 and at most 1, and --images at least 1: {wrong or args.images}.")
    cfg = load_config(args.config_file, args.opts, args.imports, trains=False)
    if not is_distillation(cfg):
        raise ConfigError("--config-file has no teacher (DISTILL.TEACHER.CONFIG_FILE), so there is none to mask.")
    require_writable("OUTPUT_DIR", cfg.OUTPUT_DIR)
    setup_logger(cfg.OUTPUT_DIR, name="d2kd")
    log_runtime(cfg.MODEL.DEVICE)
    register_datasets(cfg)
    check_datasets(cfg, ("TRAIN",))
    model = build_distilled_model(cfg).train()
    if cfg.MODEL.WEIGHTS:
        load_strictly(model.student, cfg.MODEL.WEIGHTS, "student", "--config-file and MODEL.WEIGHTS")
    else:
        logger.warning("MODEL.WEIGHTS is empty: an untrained student looks anywhere.")
    loader, gate = DistillTrainer.build_train_loader(cfg), None
    wanted = min(args.images, len(loader.records))
    # the loader is endless: one round of it, if need be, and no image of the next
    batches = itertools.islice(loader, -(-len(loader.records) // loader.batch_size))
    for gate in measure_drift(model, batches, args.ratios, wanted):
        logger.info("%d of %d images", gate.images, wanted)
    assert gate is not None  # there is an image at least, or the loader has said so
    _write(cfg, gate)
    return gate


def _write(cfg: "CfgNode", gate: "Gate") -> None:
    from d2kd.visualization import masking_plot

    directory = Path(cfg.OUTPUT_DIR)
    text = markdown(gate)
    with replacing(directory / "masking.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    rows = [drift._asdict() for drift in gate.drifts]
    content = {"drifts": rows, "resized": gate.resized, "images": gate.images, "recommended": gate.recommended()}
    write_json(directory / "masking.json", finite(content))
    with replacing(directory / "masking.png") as temporary:
        masking_plot(gate.drifts, gate.resized).savefig(temporary, format="png", dpi=110)
    logger.info("%s\nWrote %s", text, directory / "masking.md")


def markdown(gate: "Gate") -> str:
    """The table and the recommendation."""
    lines = [
        f"Cosine distance to the whole teacher's features, on {gate.images} images. On images resized by 10 %, "
        f"the whole teacher is {gate.resized:.4f} from itself.",
        "",
        "| patches | share | distance | time / whole |",
        "| --- | ---: | ---: | ---: |",
        *(f"| {d.selector} | {d.keep_ratio:g} | {d.distance:.4f} | {d.time:.2f} |" for d in gate.drifts),
        "",
    ]
    best = gate.recommended()
    lines.append(
        "No share is near enough to the whole teacher: keep more, or do without the mask."
        if best is None
        else f"Recommended: DISTILL.MASKED_TEACHER.KEEP_RATIO {best:g}."
    )
    return "\n".join(lines) + "\n"


def run(arguments: list[str] | None = None) -> None:
    """Runs the command with its arguments, by default those of the command line."""
    args = argument_parser().parse_args(arguments)
    stop_at_mistakes(args)
    from d2kd.engine import run_tool

    run_tool(lambda: main(args))
