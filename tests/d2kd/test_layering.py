"""The direction of imports, read from the source."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: What each part of d2kd may import of d2kd.
ALLOWED = {
    "api.py": {"config", "data", "engine", "errors", "modeling"},
    "errors.py": set(),
    "interrupts.py": set(),
    "runtime.py": set(),
    "rng.py": set(),
    "arguments.py": {"errors"},
    "files.py": {"errors"},
    "model_zoo.py": {"errors", "files", "runtime"},
    "plugins.py": {"errors"},
    "settings.py": {"errors"},
    "core_keys.py": {"settings"},
    "input_keys.py": {"settings"},
    "detectron2_keys.py": {"errors", "settings"},
    "config.py": {"core_keys", "detectron2_keys", "input_keys", "plugins", "runtime", "settings"},
    "config_reader.py": {"config", "errors", "files", "model_zoo", "plugins"},
    "layers": {"rng"},
    "distillers": {"config", "errors", "files", "layers", "settings"},
    "modeling": {
        "config",
        "config_reader",
        "detectron2_keys",
        "distillers",
        "errors",
        "files",
        "layers",
        "rng",
        "runtime",
        "settings",
    },
    "data": {"config", "errors", "files", "interrupts", "modeling", "rng"},
    "visualization": set(),
    "evaluation": {"config", "data", "errors", "files", "modeling", "runtime", "visualization"},
    "engine": {
        "arguments",
        "config",
        "config_reader",
        "data",
        "distillers",
        "errors",
        "evaluation",
        "files",
        "interrupts",
        "model_zoo",
        "modeling",
        "rng",
        "runtime",
        "settings",
        "visualization",
    },
    "benchmarking": {"engine", "errors", "evaluation", "files", "interrupts", "prediction", "visualization"},
    "export": {"errors", "files", "modeling"},
    "prediction": {"config", "data", "errors", "evaluation", "export", "files", "modeling", "visualization"},
    "token_learning": {
        "config",
        "data",
        "distillers",
        "engine",
        "errors",
        "files",
        "modeling",
        "rng",
        "visualization",
    },
    "cli": {
        "arguments",
        "benchmarking",
        "config",
        "data",
        "distillers",
        "engine",
        "errors",
        "evaluation",
        "export",
        "files",
        "interrupts",
        "modeling",
        "plugins",
        "prediction",
        "runtime",
        "token_learning",
        "visualization",
    },
}


def imports(path: Path, lazy: bool = True) -> Iterator[tuple[str, ...]]:
    """Absolute module names that a file imports, split at the dots; with `lazy` also those inside functions."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            yield from ((*module, alias.name) for alias in node.names)


def files(package: str) -> Iterator[Path]:
    return (ROOT / package).rglob("*.py")


@pytest.mark.parametrize("part", ALLOWED)
def test_d2kd_imports_point_one_way(part: str) -> None:
    paths = [ROOT / "d2kd" / part] if part.endswith(".py") else list(files(f"d2kd/{part}"))
    for path in paths:
        used = {name[1] for name in imports(path) if name[0] == "d2kd" and len(name) > 1}
        used -= {part, "__version__"}
        assert used <= ALLOWED[part], f"{path.relative_to(ROOT)} imports {sorted(used - ALLOWED[part])}"


def test_layers_need_torch_alone() -> None:
    for path in files("d2kd/layers"):
        outside = {name[0] for name in imports(path, lazy=False)} - {"d2kd", "torch", "numpy"} - sys.stdlib_module_names
        assert not outside, f"{path.relative_to(ROOT)} imports {sorted(outside)}"


def test_the_two_packages_do_not_know_each_other() -> None:
    for path in files("d2lite"):
        assert not {"d2kd", "detectron2"} & {name[0] for name in imports(path)}, path
    for path in files("d2kd"):
        used = {name for name in imports(path) if name[0] == "d2lite"}
        assert all(name[:3] == ("d2lite", "checkpoint", "safe_load") for name in used), path  # which needs no runtime


def test_nothing_imports_tools_or_tests() -> None:
    for package in ("d2kd", "d2lite"):
        for path in files(package):
            assert not {"tools", "tests"} & {name[0] for name in imports(path)}, path


def test_every_part_of_d2kd_has_its_rule() -> None:
    parts = {p.name for p in (ROOT / "d2kd").iterdir() if p.suffix == ".py" or (p.is_dir() and list(p.glob("*.py")))}
    assert parts - {"__init__.py"} == set(ALLOWED)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*/*.yaml")), ids=lambda p: p.stem)
def test_leaf_configs_are_short(path: Path) -> None:
    if not path.name.startswith("Base-"):
        assert len(path.read_text().splitlines()) <= 15
