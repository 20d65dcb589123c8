"""Lists what a configuration can name, each with a line of help: methods, recipes, architectures, backbones, ...

%(prog)s methods
%(prog)s recipes retinanet MaskedGenerative
%(prog)s backbones --import my_backbone.py
"""

import argparse
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from d2kd.distillers import DISTILLERS
from d2kd.engine import add_import_argument, run_tool
from d2kd.files import CONFIGS
from d2kd.modeling.architectures import ARCHITECTURES
from d2kd.modeling.teacher_passes import TEACHER_PASSES
from d2kd.plugins import import_plugins
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY


def _registered(registry: Iterable[tuple[str, Any]]) -> Callable[[], dict[str, str]]:
    return lambda: {name: _help(thing) for name, thing in registry}


def _architectures() -> dict[str, str]:
    """Those that can be built, and what d2kd knows of them, or of the nearest of their base classes."""
    found = {}
    for name, build in META_ARCH_REGISTRY:
        names = [name, *(base.__name__ for base in getattr(build, "__mro__", ()))]
        known = next((ARCHITECTURES[n] for n in names if n in ARCHITECTURES), None)
        own = getattr(build, "__module__", "").startswith("d2kd.")  # whose help says more
        found[name] = _help(build if own else known) if known else "d2kd knows its features only."
    return found


def _recipes() -> dict[str, str]:
    """YAML files that train something, by what --config-file takes, with their first line."""
    found = {}
    for path in sorted(CONFIGS.glob("*/*.yaml")):
        if not path.name.startswith("Base"):
            name = os.path.join("configs", path.relative_to(CONFIGS))
            found[name] = _first_comment(path)
    return found


def _first_comment(path: Path) -> str:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return _sentence(" ".join(lines))


def _help(thing: Any) -> str:
    return _sentence(" ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split()))


def _sentence(text: str) -> str:
    """The first sentence; a dot ends none within a word, or before a number."""
    return re.split(r"\.\s+(?=[A-Z`])", text)[0].removesuffix(".")


#: What can be listed: by its name, a function that returns the lines of help by the names that a configuration uses.
KINDS: Mapping[str, Callable[[], dict[str, str]]] = {
    "methods": _registered(DISTILLERS),
    "recipes": _recipes,
    "architectures": _architectures,
    "backbones": _registered(BACKBONE_REGISTRY),
    "heads": _registered(SEM_SEG_HEADS_REGISTRY),
    "passes": _registered(TEACHER_PASSES),
}


def lines(kind: str, words: Iterable[str] = ()) -> list[str]:
    """Returns a line for each name, sorted, or for those that have all words in name or help, in any case.

    Args:
        kind: of `KINDS`.
        words: to look for.
    """
    known = KINDS[kind]()
    chosen = {
        name: text
        for name, text in sorted(known.items(), key=lambda item: item[0].lower())
        if all(word.lower() in f"{name} {text}".lower() for word in words)
    }
    width = max(map(len, chosen), default=0)
    return [f"{name:{width}}  {text}".rstrip() for name, text in chosen.items()]


def argument_parser() -> argparse.ArgumentParser:
    """The arguments of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS, help="what to list")
    parser.add_argument("words", nargs="*", metavar="WORD", help="only what has all of these in its name or its help")
    add_import_argument(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Prints the list; without any line, says so and ends with status 1."""
    import_plugins(args.imports)
    found = lines(args.kind, args.words)
    print("\n".join(found) if found else f"No {args.kind} with {' and '.join(args.words)}.")
    if not found:
        sys.exit(1)


def run(arguments: list[str] | None = None) -> None:
    """Runs the command with its arguments, by default those of the command line."""
    args = argument_parser().parse_args(arguments)
    run_tool(lambda: main(args))
