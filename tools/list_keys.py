#!/usr/bin/env python
"""Prints the keys of the methods, as each declares them: default, range and meaning, in Markdown.

python tools/list_keys.py                                          # those of d2kd and of installed packages
python tools/list_keys.py MaskedGenerative                         # one of them, with the keys that all methods have
python tools/list_keys.py MyMethod --import my_method.py           # one of your own
python tools/list_keys.py > docs/keys.md
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence

from d2kd.config_reader import read_config
from d2kd.distillers import DISTILLERS, Distiller
from d2kd.distillers.receptive_tokens import LearnSettings
from d2kd.engine import add_import_argument, run_tool
from d2kd.errors import require_choice
from d2kd.settings import Configurable, Setting

TITLE = """\
# Keys of the methods

Made by `python tools/list_keys.py` from what each method declares; a test compares the two. All other keys have a
comment each in [`d2kd/config.py`](../d2kd/config.py). What the methods are: [methods.md](methods.md)."""

#: Nodes inside a method's node, by method.
PARTS: Mapping[str, Mapping[str, type[Configurable]]] = {"ReceptiveTokens": {"LEARN": LearnSettings}}


def main(methods: Sequence[str]) -> None:
    """Prints the keys of some methods, by default of all."""
    known = sorted(name for name, _ in DISTILLERS)
    for name in methods:
        require_choice("The method", name, known)
    print("\n".join(page(methods or known)))


def page(methods: Sequence[str]) -> Iterator[str]:
    """Yields the lines of the page."""
    shared = Distiller.SETTINGS
    yield from (TITLE, "", "## Every method", "")
    yield "Below the node of each method, e.g. `DISTILL.FEATURE_MIMIC.WEIGHT`; some have another default, see below."
    yield from ("", *table(shared))
    for name in methods:
        method = DISTILLERS.get(name)
        yield from ("", f"## {name}", "", f"Below `DISTILL.{method.NODE}`.")
        own = {name: declared for name, declared in method.SETTINGS.items() if shared.get(name) != declared}
        yield from ("", *table(own)) if own else ("It has the keys of every method only.",)
        for node, part in PARTS.get(name, {}).items():
            yield from ("", f"Below `DISTILL.{method.NODE}.{node}`.", "", *table(part.SETTINGS))


def table(settings: Mapping[str, Setting]) -> Iterator[str]:
    """Yields the lines of a table of keys."""
    yield from ("| key | default | range | meaning |", "| --- | --- | --- | --- |")
    for declared in settings.values():
        cells = [f"`{declared.key}`", f"`{default_of(declared)}`", range_of(declared), declared.doc]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def default_of(declared: Setting) -> str:
    """Returns a default as YAML has it."""
    return '""' if declared.default == "" else str(declared.default)


def range_of(declared: Setting) -> str:
    """Returns the type of a key and what values it takes."""
    kind = type(declared.default).__name__
    if kind == "list":
        kind = f"list of {(declared.items or str).__name__}"
    bounds = ((">=", declared.at_least), (">", declared.above), ("<=", declared.at_most))
    rules = [f"{sign} {bound:g}" for sign, bound in bounds if bound is not None]
    if declared.choices:
        rules.append("one of " + ", ".join(f"`{choice}`" for choice in declared.choices))
    return ", ".join([kind, *rules])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="by default all")
    add_import_argument(parser)
    args = parser.parse_intermixed_args()

    def run() -> None:
        read_config("", imports=args.imports)
        main(args.methods)

    run_tool(run)
