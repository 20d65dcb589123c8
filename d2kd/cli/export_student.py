"""Writes the student of a training checkpoint as a plain Detectron2 checkpoint, without optimizer and distillers.

%(prog)s output/model_0004999.pth student.pth [--config-file student.yaml]
"""

import argparse
import logging
import os

from d2kd.arguments import add_import_argument

from .mistakes import stop_at_mistakes

logger = logging.getLogger(__name__)


def export(source: str, target: str, average: bool = False) -> int:
    """Writes `target`, with the names of the classes; returns the number of tensors in it.

    Args:
        source: a checkpoint of a training run.
        target: the file to write.
        average: take the moving average of the weights (SOLVER.EMA) instead of the weights.

    Raises:
        CheckpointError: `source` cannot be read, or holds no model.
    """
    from d2kd.engine import CheckpointError
    from d2kd.modeling.checkpoint_files import (
        InvalidCheckpointError,
        read_checkpoint,
        without_checksum,
        write_checkpoint,
    )

    try:
        content = without_checksum(source, read_checkpoint(source))
    except InvalidCheckpointError as error:
        raise CheckpointError(f"{source} cannot be read as a checkpoint: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise CheckpointError(f"{source} holds no 'model': it is not a training checkpoint.")
    if average:
        if "ema" not in content:
            raise CheckpointError(f"{source} holds no 'ema': its run did not set SOLVER.EMA.ENABLED.")
    weights = content["ema"]["model"] if average else content["model"]
    kept = {key: content[key] for key in ("class_names",) if key in content}
    write_checkpoint(target, {"model": weights, **kept})
    return len(weights)


def main(args: argparse.Namespace) -> None:
    """Exports, and checks the result against a configuration where one is given."""
    from d2kd.engine import CheckpointError, load_config, log_runtime
    from d2kd.modeling import build_network, load_strictly
    from detectron2.utils.logger import setup_logger

    setup_logger(name="d2kd")
    log_runtime()
    if not os.path.isfile(args.source):
        raise CheckpointError(f"There is no checkpoint {args.source}.")
    if args.config_file:  # before anything is written: an earlier export must not give way to one that does not fit
        cfg = load_config(args.config_file, args.opts, args.imports)
        cfg.MODEL.DEVICE = "cpu"
        load_strictly(build_network(cfg, "--config-file"), args.source, "student", "--config-file")
    count = export(args.source, args.target, args.ema)
    logger.info("Wrote %d tensors, %.1f MB, to %s", count, os.path.getsize(args.target) / 1e6, args.target)


def run(arguments: list[str] | None = None) -> None:
    """Runs the command with its arguments, by default those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="checkpoint of a training run, of any iteration")
    parser.add_argument("target", help="file to write")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights (SOLVER.EMA)")
    parser.add_argument("--config-file", default="", help="student's YAML: check that every key fits it")
    parser.add_argument("opts", nargs="*", help="changes to the YAML: KEY VALUE ...")
    add_import_argument(parser)
    args = parser.parse_intermixed_args(arguments)
    stop_at_mistakes(args)
    from d2kd.engine import run_tool

    run_tool(lambda: main(args))
