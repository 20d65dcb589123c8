"""What the documentation prints runs as it is, and what it links to is there."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from documentation import code_block, command_line
from runs import ROOT, environment, tool

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "datasets/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def run_as_printed(command: list[str], directory: Path, *options: Any) -> str:
    """Runs a command of the documentation for three iterations, in the directory that it is written for."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.run(
        [*command, *map(str, options), "SOLVER.MAX_ITER", "3"],
        cwd=directory,
        env={**environment(), "PYTHONPATH": paths},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


def distilled(output: Path) -> set[str]:
    """Names of the losses of distillation in a run's metrics."""
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return {name for line in lines for name in line if name.startswith("distill/")}


def test_the_example_of_a_method_runs_as_printed(
    write_config: Callable[..., Path], teacher: dict[str, Any], tmp_path: Path
) -> None:
    code = code_block("methods.md", "Writing one")
    assert len(code.splitlines()) <= 25
    (tmp_path / "cosine_mimic.py").write_text(code)
    write_config("student", MODEL__FPN__OUT_CHANNELS=16)  # the teacher has 8
    run = run_as_printed(command_line("methods.md", "Writing one"), tmp_path)
    assert "CosineMimic at p3, p4" in run
    assert distilled(tmp_path / "student") == {"distill/CosineMimic/p3", "distill/CosineMimic/p4"}


def test_the_example_of_a_pass_runs_as_printed(
    write_config: Callable[..., Path], teacher: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "strong_cells.py").write_text(code_block("architectures.md", "A pass of the teacher"))
    write_config("student")
    run_as_printed(command_line("architectures.md", "A pass of the teacher"), tmp_path)
    assert distilled(tmp_path / "student") == {"distill/FeatureMimic/p3", "distill/FeatureMimic/p4"}
    assert "TEACHER_PASS: StrongCells" in (tmp_path / "student" / "config.yaml").read_text()


def test_the_table_of_keys_is_current() -> None:
    assert tool("list_keys").stdout == (ROOT / "docs" / "keys.md").read_text(), (
        "python tools/list_keys.py > docs/keys.md"
    )


def test_keys_of_a_method_of_ones_own_can_be_listed() -> None:
    plugin = ROOT / "tests" / "d2kd" / "plugins" / "cosine_mimic.py"
    listed = tool("list_keys", "CosineMimic", "--import", plugin).stdout
    assert "| `POWER` | `1.0` | float, > 0, <= 4 | Exponent of the distance. |" in listed
    assert "FEATURE_MIMIC.NORMALIZE" not in listed
    unknown = tool("list_keys", "CosinMimic", "--import", plugin, check=False)
    assert unknown.returncode == 2 and "Did you mean CosineMimic" in unknown.stdout.splitlines()[-1]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if anchor:
            assert anchor in {anchor_of(line) for line in there.read_text().splitlines() if line.startswith("#")}, (
                target
            )


def anchor_of(heading: str) -> str:
    """What a heading is called in links to it."""
    return re.sub(r"[^\w\- ]", "", heading.lstrip("#").strip().lower()).replace(" ", "-")


def test_every_method_has_a_row_in_the_tables() -> None:
    code = "import d2kd; print(*sorted(name for name, _ in d2kd.DISTILLERS))"
    names = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for page in (ROOT / "README.md", ROOT / "docs" / "methods.md"):
        rows = re.findall(r"^\| `(\w+)`", page.read_text(), re.MULTILINE)
        assert set(names.split()) <= set(rows), page
