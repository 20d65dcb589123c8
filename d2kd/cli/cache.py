"""Fills, describes or empties a cache of a teacher's features (DISTILL.CACHE.DIR).

%(prog)s build --config-file student.yaml DISTILL.CACHE.DIR features
%(prog)s info features
%(prog)s clear features --collection 0f3c5a7e9b1d2468

`build` runs the teacher on all that a training's student will see, so that the training itself never does. What a
training looks up and does not find it adds itself: building is for time, not for need.
"""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2kd.arguments import add_import_argument
from d2kd.errors import ConfigError

from .mistakes import stop_at_mistakes

if TYPE_CHECKING:
    from d2kd.modeling.feature_cache import FeatureStore


def argument_parser() -> argparse.ArgumentParser:
    """The arguments of this program."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    commands = parser.add_subparsers(dest="command", required=True, metavar="build|info|clear")
    build = commands.add_parser("build", help="run the teacher on all that a training's student will see")
    build.add_argument("--config-file", required=True, metavar="FILE", help="YAML of the training")
    build.add_argument("--teacher-config", metavar="FILE", help="YAML of the teacher (DISTILL.TEACHER.CONFIG_FILE)")
    build.add_argument("--teacher-weights", metavar="FILE", help="its checkpoint (DISTILL.TEACHER.WEIGHTS)")
    build.add_argument("--method", help="methods whose taps are kept, separated by commas (DISTILL.METHODS)")
    build.add_argument(
        "--iterations",
        type=int,
        default=0,
        metavar="N",
        help="of the training to fill it for, where batches mix images of several sizes (default: all)",
    )
    add_import_argument(build)
    build.add_argument("opts", nargs="*", metavar="KEY VALUE", help="changes to the configuration")
    info = commands.add_parser("info", help="print what a cache holds, and how much of it")
    clear = commands.add_parser("clear", help="remove all entries")
    clear.add_argument("--collection", default="", metavar="NAME", help="those of one teacher only, as info names it")
    for command in (info, clear):
        command.add_argument("folder", help="the cache")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: the folder is no cache, or has no such collection.
    """
    if args.command == "build":
        if args.iterations < 0:
            raise ConfigError(f"--iterations is {args.iterations}; it must be at least 0.")
        return
    known = [path.parent.name for path in Path(args.folder).glob("*/about.json")]
    if not known:
        raise ConfigError(f"{args.folder!r} is no cache of features: there is no collection in it.")
    if args.command == "clear" and args.collection and args.collection not in known:
        raise ConfigError(f"--collection is {args.collection!r}; {args.folder} has {', '.join(sorted(known))}.")


def info(folder: str) -> str:
    """Returns what a cache holds: a paragraph for each teacher."""
    from d2kd.modeling.feature_cache import GB, read_about

    store = _store(folder)
    total, paragraphs = 0, []
    for collection in store.collections():
        entries = list(store.entries(collection.name))
        size = sum(entry.size for entry in entries)
        total += size
        about = read_about(collection)
        used = max((entry.used for entry in entries), default=None)
        lines = {
            "teacher": f"{about.get('architecture', '?')}, weights {str(about.get('weights', '?'))[:16]}",
            "taps": ", ".join(about.get("taps", ())),
            "kept as": f"{about.get('dtype', '?')}, of each {about.get('run', '?')}",
            "arithmetic": _words(about.get("arithmetic", {})),
            "entries": f"{len(entries):,}, {size / GB:.3f} GB"
            + (f", {size / len(entries) / 1e6:.3f} MB each" if entries else ""),
            "last used": "never" if used is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(used)),
        }
        paragraphs.append("\n".join([collection.name, *(f"  {name:11}{text}" for name, text in lines.items())]))
    return "\n\n".join([*paragraphs, f"{total / GB:.3f} GB together"])


def _words(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _store(folder: str) -> "FeatureStore":
    from d2kd.modeling.feature_cache import FeatureStore

    return FeatureStore(folder, 0)


def main(args: argparse.Namespace) -> None:
    """Builds, describes or empties."""
    if args.command == "info":
        print(info(args.folder))
    elif args.command == "clear":
        count, size = _store(args.folder).clear(args.collection)
        print(f"{count:,} entries removed, {size / 1e9:.3f} GB")
    else:
        from d2kd.arguments import command_line_options
        from d2kd.engine import load_config
        from d2kd.engine.cache_building import build_cache
        from d2kd.engine.epochs import resolve_epochs
        from d2kd.engine.scaling import scale_to_batch
        from detectron2.utils.logger import setup_logger

        setup_logger(name="d2kd")
        cfg = load_config(args.config_file, command_line_options(args), args.imports)
        scale_to_batch(cfg)
        resolve_epochs(cfg)
        built = build_cache(cfg, args.iterations)
        print(f"{built.found:,} images were there, {built.computed:,} were computed: {cfg.DISTILL.CACHE.DIR}")


def run(arguments: list[str] | None = None) -> None:
    """Runs the command with its arguments, by default those of the command line."""
    args = argument_parser().parse_args(arguments)
    if args.command == "build":
        stop_at_mistakes(args, check_arguments)
    else:
        args.config_file, args.imports, args.opts = "", [], []
        stop_at_mistakes(args, check_arguments)
    from d2kd.engine import run_tool

    run_tool(lambda: main(args))
