"""Writes the student of a training checkpoint as a plain Detectron2 checkpoint, without optimizer and distillers.

With --format it is a file that runs without d2kd, verified on images of other sizes.

%(prog)s output/model_0004999.pth student.pth [--config-file student.yaml]
%(prog)s output/model_final.pth student.onnx --format onnx --config-file student.yaml
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
    if os.path.realpath(args.source) == os.path.realpath(args.target):
        raise CheckpointError(f"{args.target} is the checkpoint that is exported: name another file to write.")
    _check_format(args)
    _check_target(args.target, args.format)
    if args.format:
        _export_format(args)
        return
    if args.config_file:  # before anything is written: an earlier export must not give way to one that does not fit
        cfg = load_config(args.config_file, args.opts, args.imports, trains=False)
        cfg.MODEL.DEVICE = "cpu"
        load_strictly(build_network(cfg, "--config-file"), args.source, "student", "--config-file")
    count = export(args.source, args.target, args.ema)
    logger.info("Wrote %d tensors, %.1f MB, to %s", count, os.path.getsize(args.target) / 1e6, args.target)


def _check_format(args: argparse.Namespace) -> None:
    """
    Raises:
        ExportError: an argument has no effect without a format, or with this one.
    """
    from d2kd.export import ExportError

    given = {"--precision": args.precision, "--opset": args.opset, "--images": args.images}
    unused = next((flag for flag, value in given.items() if value is not None), None)
    if unused and args.format not in ("torchscript", "onnx"):
        raise ExportError(f"{unused} is for --format torchscript or onnx: give one of them, or leave {unused} out.")


def _check_target(target: str, file_format: str | None) -> None:
    """
    Raises:
        UserError: the name is that of files of another format, or the file cannot be written.
    """
    from d2kd.export import SUFFIXES, ExportError
    from d2kd.files import require_writable

    if file_format is not None and not target.endswith(SUFFIXES[file_format]):
        suffixes = " or ".join(SUFFIXES[file_format])
        raise ExportError(f"{target}: the name of a file of --format {file_format} ends in {suffixes}.")
    suffix = os.path.splitext(target)[1].lower()
    if file_format is None:
        meant = next((name for name, suffixes in SUFFIXES.items() if name != "torch" and suffix in suffixes), None)
        if meant is not None:
            raise ExportError(
                f"{target}: without --format a PyTorch checkpoint is written, whose name ends in .pth, and {suffix} is "
                f"of another kind of file. Give --format {meant}, or another name."
            )
        if suffix in (".safetensors", ".pkl"):  # which would be read as what it is not
            raise ExportError(
                f"{target}: a PyTorch checkpoint is written, whose name ends in .pth and not in {suffix}."
            )
    require_writable("The file", target, is_file=True)


def _export_format(args: argparse.Namespace) -> None:
    """Exports to a file of another format than a checkpoint alone."""
    import tempfile

    from d2kd.engine import load_config
    from d2kd.errors import ConfigError
    from d2kd.export import ExportError, export_model, export_plain, read_folder, require_packages
    from d2kd.modeling import build_network, load_strictly
    from d2kd.prediction.classes import known_classes

    if not args.config_file:
        raise ConfigError("--format needs --config-file: the YAML of the student.")
    require_packages(args.format)
    cfg = load_config(args.config_file, args.opts, args.imports, trains=False)
    cfg.MODEL.DEVICE = "cpu"
    model = build_network(cfg, "--config-file")
    with tempfile.TemporaryDirectory() as folder:
        weights = os.path.join(folder, "average.pth") if args.ema else args.source
        if args.ema:
            export(args.source, weights, args.ema)
        saved = load_strictly(model, weights, "student", "--config-file")
    names = saved.get("class_names") or {}
    if not names:
        logger.warning("%s holds no class names, so that the export has none.", args.source)
    classes = known_classes(cfg, names, args.source) if names else {}
    try:
        if args.format == "torch":
            files = export_plain(cfg, model, args.target, names)
            logger.info("Wrote %s: plain Detectron2 builds the same model.", ", ".join(map(str, files)))
            return
        images = read_folder(args.images, cfg.INPUT.FORMAT) if args.images else ()
        found = export_model(
            cfg,
            model,
            args.target,
            args.format,
            class_names=names,
            class_ids={kind: known.ids for kind, known in classes.items()},
            precision=args.precision or "fp32",
            opset=args.opset or 17,
            images=images,
        )
    except OSError as error:
        raise ExportError(f"{args.target} cannot be written: {error.strerror or error}") from error
    logger.info("Verified in a process without d2kd: %s", found)
    logger.info("Wrote %.1f MB to %s", os.path.getsize(args.target) / 1e6, args.target)


def run(arguments: list[str] | None = None) -> None:
    """Runs the command with its arguments, by default those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="checkpoint of a training run, of any iteration")
    parser.add_argument("target", help="file to write")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights (SOLVER.EMA)")
    parser.add_argument("--config-file", default="", help="student's YAML: check that every key fits it")
    parser.add_argument(
        "--format",
        choices=("torch", "torchscript", "onnx"),
        help="torch: weights, YAML of plain Detectron2, class names | torchscript, onnx: one file with post-processing",
    )
    parser.add_argument("--precision", choices=("fp32", "fp16"), help="of a TorchScript or ONNX file (default: fp32)")
    parser.add_argument("--opset", type=int, choices=range(16, 21), help="of ONNX (default: 17)")
    parser.add_argument("--images", metavar="FOLDER", help="images to verify with, the first five; else drawn ones")
    parser.add_argument("opts", nargs="*", help="changes to the YAML: KEY VALUE ...")
    add_import_argument(parser)
    args = parser.parse_intermixed_args(arguments)
    stop_at_mistakes(args)
    from d2kd.engine import run_tool

    run_tool(lambda: main(args))
