#!/usr/bin/env python
"""Prints the keys that d2kd adds to a configuration, as they are declared: default, range and meaning, in Markdown.

python tools/list_keys.py                                          # all, also those of installed packages
python tools/list_keys.py MaskedGenerative                         # of one method, with the keys that all methods have
python tools/list_keys.py MyMethod --import my_method.py           # one of your own
python tools/list_keys.py > docs/keys.md
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence

from d2kd.config import list_declared
from d2kd.config_reader import read_config
from d2kd.distillers import DISTILLERS, Distiller
from d2kd.engine import add_import_argument, run_tool
from d2kd.errors import require_choice
from d2kd.settings import Setting

TITLE = """\
# Keys

Made by `python tools/list_keys.py` from what stands beside the default of each key; a test compares the two. All values
are checked against it when a configuration is read; those of Detectron2's own keys against
[`d2kd/detectron2_keys.py`](../d2kd/detectron2_keys.py). What the methods are: [methods.md](methods.md)."""

#: Bounds of numbers, as short as a table wants them.
SIGNS = {"at least": ">=", "above": ">", "at most": "<=", "below": "<"}


def main(methods: Sequence[str]) -> None:
    """Prints the keys of some methods, by default all keys."""
    known = sorted(name for name, _ in DISTILLERS)
    for name in methods:
        require_choice("The method", name, known)
    print("\n".join([TITLE, *methods_page(methods)] if methods else [TITLE, *nodes_page(), *methods_page(known)]))


def nodes_page() -> Iterator[str]:
    """Yields the lines on the keys of no method, with one table for each node."""
    nodes: dict[str, dict[str, Setting]] = {}
    for key, declared in list_declared().items():
        node, _, name = key.rpartition(".")
        nodes.setdefault(node, {})[name] = declared
    for node in sorted(nodes):
        yield from ("", f"## {node}", "", *table(nodes[node]))


def methods_page(methods: Sequence[str]) -> Iterator[str]:
    """Yields the lines on the keys of some methods."""
    shared = by_key(Distiller.SETTINGS)
    yield from ("", "## Every method", "")
    yield "Below the node of each method, e.g. `DISTILL.FEATURE_MIMIC.WEIGHT`; some have another default, see below."
    yield from ("", *table(shared))
    for node, part in Distiller.NODES.items():
        yield from ("", f"Below `{node}` there, e.g. `DISTILL.FEATURE_MIMIC.{node}.SHAPE`.", "")
        yield from table(by_key(part.SETTINGS))
    for name in methods:
        method = DISTILLERS.get(name)
        yield from ("", f"## {name}", "", f"Below `DISTILL.{method.NODE}`.")
        own = {key: declared for key, declared in by_key(method.SETTINGS).items() if shared.get(key) != declared}
        yield from ("", *table(own)) if own else ("It has the keys of every method only.",)
        for node, part in method.NODES.items():
            if Distiller.NODES.get(node) is part:
                continue
            yield from ("", f"Below `DISTILL.{method.NODE}.{node}`.", "", *table(by_key(part.SETTINGS)))


def by_key(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """Returns settings by their keys instead of their attributes."""
    return {declared.key: declared for declared in settings.values()}


def table(settings: Mapping[str, Setting]) -> Iterator[str]:
    """Yields the lines of a table of keys."""
    yield from ("| key | default | range | meaning |", "| --- | --- | --- | --- |")
    for key, declared in settings.items():
        cells = [f"`{key}`", f"`{default_of(declared)}`", range_of(declared), declared.doc]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def default_of(declared: Setting) -> str:
    """Returns a default as YAML has it."""
    return '""' if declared.default == "" else str(declared.default)


def range_of(declared: Setting) -> str:
    """Returns the type of a key and what values it takes."""
    kind = "any" if declared.kind is object else declared.kind.__name__
    rules = [f"{SIGNS[words]} {bound:g}" for bound, _, words in declared.bounds]
    if declared.words:
        rules.append("one of " + ", ".join(f"`{word}`" if word else '`""`' for word in declared.words))
    if declared.rule is not None:
        rules.append(declared.rule.words.removeprefix("must be "))
    return ", ".join([f"list of {kind}" if declared.is_list else kind, *rules])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="by default all")
    add_import_argument(parser)
    args = parser.parse_intermixed_args()

    def run() -> None:
        read_config("", imports=args.imports)
        main(args.methods)

    run_tool(run)
