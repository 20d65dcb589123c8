"""Files and recipes: what is found where."""

from pathlib import Path

import pytest

from d2kd import files
from d2kd.files import find_config

NAME = "PhotoDigits/retinanet_student.yaml"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working directory without recipes."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", [NAME, f"configs/{NAME}", f"./configs/{NAME}"])
def test_recipes_are_found_from_anywhere(elsewhere, path):
    found = Path(find_config(path))
    assert found == files.CONFIGS / NAME and found.is_file()


def test_files_of_the_working_directory_come_first(elsewhere):
    own = elsewhere / "configs" / NAME
    own.parent.mkdir(parents=True)
    own.write_text("MODEL: {}\n")
    assert find_config(f"configs/{NAME}") == f"configs/{NAME}"


@pytest.mark.parametrize("path", ["", "none.yaml", "configs", "configs/none.yaml", "PhotoDigits", f"/none/{NAME}"])
def test_what_is_no_recipe_stays_as_it_is(elsewhere, path):
    assert find_config(path) == path


def test_recipes_stand_beside_the_package_or_in_it():
    package = Path(files.__file__).parent
    assert files.CONFIGS in (package / "configs", package.parent / "configs")
    assert list(files.CONFIGS.glob("Base-*.yaml"))
