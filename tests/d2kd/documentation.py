"""Reads code out of the documentation, so that tests run what is printed there."""

import re
import shlex
import sys

from runs import ROOT


def code_block(page: str, heading: str, language: str = "python") -> str:
    """The first block of a language below a heading of a page in docs/."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    below = text.split(f"\n## {heading}\n", 1)[1].split("\n## ")[0]
    return re.search(rf"```{language}\n(.*?)```", below, re.DOTALL)[1]


def command_line(page: str, heading: str) -> list[str]:
    """The command `d2kd ...` below a heading, as a program of this environment."""
    name, *arguments = shlex.split(code_block(page, heading, "bash").replace("\\\n", " "))
    assert name == "d2kd"
    return [sys.executable, "-m", "d2kd.cli", *arguments]
