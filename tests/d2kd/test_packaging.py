"""The metadata of the package: dependencies that are used, imports that are declared, recipes and versions."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from runs import ROOT, environment

import d2kd
from d2kd import cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = METADATA["project"]
EXTRAS = PROJECT["optional-dependencies"]
#: What is imported, where that is not the distribution's name with "_" for "-".
MODULES = {
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "tensorboard": "torch.utils.tensorboard",
}
#: The programs that pyproject.toml declares: run, not imported.
PROGRAMS = {"hypothesis", "build", "mypy", "types-pyyaml", "pre-commit", "pytest", "pytest-xdist", "ruff"}


def module_of(requirement: str) -> str:
    """Returns what code imports of a requirement such as "opencv-python-headless>=4.7"."""
    name = distribution(requirement)
    return MODULES.get(name, name.replace("-", "_"))


def distribution(requirement: str) -> str:
    return re.match(r"[\w-]+", requirement).group().lower()


def imported(*folders: str) -> Iterator[str]:
    """Yields the modules that files import, also inside functions."""
    for path in (p for folder in folders for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield node.module or ""


def test_dependencies_are_imported() -> None:
    modules = set(imported("d2kd", "d2lite", "tools"))
    roots = modules | {name.partition(".")[0] for name in modules}
    assert [r for r in PROJECT["dependencies"] if module_of(r) not in roots] == []


@pytest.mark.parametrize("extra", ["cityscapes", "digits", "formats", "onnx", "wandb"])
def test_extras_are_imported(extra: str) -> None:
    roots = {name.partition(".")[0] for name in imported("d2kd", "d2lite", "datasets")}
    roots |= {"onnxscript"}  # which PyTorch's exporter imports
    assert [r for r in EXTRAS[extra] if module_of(r) not in roots] == []


def test_imports_are_declared() -> None:
    optional = [r for extra in ("cityscapes", "digits", "formats", "onnx", "wandb") for r in EXTRAS[extra]]
    declared = {module_of(r) for r in [*PROJECT["dependencies"], *optional]} | {"d2kd", "d2lite", "detectron2"}
    used = {name.partition(".")[0] for name in imported("d2kd", "d2lite", "tools", "datasets")} - {""}
    assert used - declared - sys.stdlib_module_names == set()


def test_tests_need_what_the_extra_test_declares() -> None:
    needed = [r for r in EXTRAS["test"] if distribution(r) != "d2kd"]
    assert {distribution(r) for r in needed} <= PROGRAMS
    assert EXTRAS["test"][0] == "d2kd[cityscapes,digits,formats,onnx]" and EXTRAS["dev"][0] == "d2kd[test]"


def test_requirements_are_ranges() -> None:
    for requirement in [*PROJECT["dependencies"], *(r for extra in EXTRAS.values() for r in extra)]:
        assert re.fullmatch(r"[\w-]+>=[\w.]+|d2kd\[[\w,]+\]", requirement), requirement


def test_versions_agree() -> None:
    path = ROOT / METADATA["tool"]["hatch"]["version"]["path"]
    written = re.search(r'^__version__ = "(.+)"$', path.read_text(encoding="utf-8"), re.MULTILINE)
    assert PROJECT["dynamic"] == ["version"] and written and written.group(1) == d2kd.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    section = "Unreleased" if ".dev" in d2kd.__version__ else d2kd.__version__
    assert re.search(rf"^## \[{re.escape(section)}\]", changes, re.MULTILINE)
    released = re.findall(r"^## \[(\d.*?)\]", changes, re.MULTILINE)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    assert str(cited) == released[0]


def test_the_wheel_has_packages_recipes_and_the_mark_of_types() -> None:
    wheel = METADATA["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["only-include"] == ["d2kd", "d2lite", "configs"]
    assert wheel["sources"] == {"configs": "d2kd/configs"}
    assert (ROOT / "d2kd/py.typed").is_file() and not (ROOT / "d2kd/configs").exists()


def test_the_entry_point_is_the_dispatcher() -> None:
    assert PROJECT["scripts"] == {"d2kd": "d2kd.cli:main"} and callable(cli.main)


@pytest.mark.parametrize(
    "module, program, install",
    [
        (
            "sklearn",
            "import runpy; sys.argv = ['prepare', '--output', sys.argv[1]]; "
            "runpy.run_path('datasets/prepare_photo_digits.py', run_name='__main__')",
            "pip install scikit-learn",
        ),
        (
            "shapely",
            "from d2lite.data.datasets import cityscapes; cityscapes._from_polygons('none.json', True)",
            "pip install shapely",
        ),
    ],
)
def test_a_missing_extra_is_one_clear_line(tmp_path: Path, module: str, program: str, install: str) -> None:
    hide = (
        f"import importlib.util, sys; find = importlib.util.find_spec; sys.modules[{module!r}] = None; "
        f"importlib.util.find_spec = lambda name, *rest: None if name == {module!r} else find(name, *rest); "
    )
    command = [sys.executable, "-c", hide + program, str(tmp_path / "digits")]
    variables = {**environment(), "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert run.returncode == 1 and install in run.stderr.splitlines()[-1]
    assert not (tmp_path / "digits").exists()
