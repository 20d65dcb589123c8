"""Lists what a configuration can name, each with a line of help: methods, recipes, architectures, backbones, ...

%(prog)s methods
%(prog)s recipes retinanet MaskedGenerative
%(prog)s backbones --import my_backbone.py
"""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from d2kd.arguments import add_import_argument
from d2kd.files import CONFIGS

from .names import Names, first_sentence, kept_table

#: What can be listed.
KINDS = ("methods", "recipes", "architectures", "backbones", "heads", "passes")


def lines(kind: str, words: Iterable[str] = (), names: Names | None = None) -> list[str]:
    """Returns a line for each name, sorted, or for those that have all words in name or help, in any case.

    Args:
        kind: of `KINDS`.
        words: to look for.
        names: what is registered; None takes the table of names, or imports everything where there is none.
    """
    known = _recipes() if kind == "recipes" else (names or known_names())[kind]
    chosen = {
        name: text
        for name, text in sorted(known.items(), key=lambda item: item[0].lower())
        if all(word.lower() in f"{name} {text}".lower() for word in words)
    }
    width = max(map(len, chosen), default=0)
    return [f"{name:{width}}  {text}".rstrip() for name, text in chosen.items()]


def known_names() -> Names:
    """Returns what is registered without plugins, but with those of installed packages, quickly if possible."""
    table = kept_table()
    if table is not None:
        names: Names = table["names"]
        return names
    from d2kd.plugins import import_installed

    from .registered import registered_names

    import_installed()
    return registered_names()


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
    return first_sentence(" ".join(lines))


def argument_parser() -> argparse.ArgumentParser:
    """The arguments of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS, help="what to list")
    parser.add_argument("words", nargs="*", metavar="WORD", help="only what has all of these in its name or its help")
    add_import_argument(parser)
    return parser


def main(args: argparse.Namespace, names: Names | None = None) -> None:
    """Prints the list; without any line, says so and ends with status 1."""
    found = lines(args.kind, args.words, names)
    print("\n".join(found) if found else f"No {args.kind} with {' and '.join(args.words)}.")
    if not found:
        sys.exit(1)


def _main_with_imports(args: argparse.Namespace) -> None:
    from d2kd.plugins import import_installed, import_plugins

    from .registered import registered_names

    import_installed()
    import_plugins(args.imports)
    main(args, registered_names())


def run(arguments: list[str] | None = None) -> None:
    """Runs the command with its arguments, by default those of the command line."""
    args = argument_parser().parse_args(arguments)
    if not args.imports:
        return main(args)
    from d2kd.engine import run_tool

    run_tool(lambda: _main_with_imports(args))
