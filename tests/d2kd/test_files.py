"""Files and recipes: what is found where."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from runs import forget

from d2kd import cli, files
from d2kd.errors import UserError
from d2kd.files import find_config
from detectron2.data import DatasetCatalog

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


def refused(path, **options):
    """The message with which an output is refused; "" where it is not."""
    try:
        files.require_writable("--output", path, **options)
    except UserError as error:
        return str(error)
    return ""


def test_what_cannot_be_written_is_told_and_nothing_is_left(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "new/below", Path("relative")):
        assert refused(path) == "" and refused(path / "x.png", is_file=True) == ""
    assert refused(tmp_path / "file", is_file=True) == ""  # it is written over
    assert refused(tmp_path / "file") == f"--output {tmp_path / 'file'} is a file: name a folder."
    assert refused(tmp_path, is_file=True) == f"--output {tmp_path} is a folder: name a file."
    below = tmp_path / "file/below/x"
    assert (
        refused(below) == f"--output {below} cannot be written (Not a directory): name another folder, or make room "
        "for it."
    )
    assert "name a file in another folder" in refused(below / "x.png", is_file=True)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file"] and (tmp_path / "file").read_text() == "mine"
    assert not Path("relative").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a file system that takes no folders, whoever asks")
@pytest.mark.parametrize(
    "command",
    [
        "report --output {} --run teacher=none",
        "predict {image} --config-file PhotoDigits/retinanet_student.yaml --output {}",
        "features --weights {image} --config-file PhotoDigits/retinanet_student.yaml --output {}",
        "benchmark --config-file PhotoDigits/retinanet_student.yaml --output {}",
        "export {image} {}/x.pth",
        "export {image} {}/x.onnx --format onnx --config-file PhotoDigits/retinanet_student.yaml",
        "data show --config-file PhotoDigits/retinanet_student.yaml --output {}/x.png",
        "masking-gate --config-file PhotoDigits/retinanet_student_MaskedTeacher.yaml OUTPUT_DIR {}",
        "learn-tokens --config-file PhotoDigits/retinanet_teacher.yaml OUTPUT_DIR {}",
        "train --config-file PhotoDigits/retinanet_student.yaml OUTPUT_DIR {}",
        "eval --config-file PhotoDigits/retinanet_student.yaml MODEL.WEIGHTS {image} OUTPUT_DIR {}",
    ],
)
@pytest.mark.parametrize("output", ["/proc/x", "{image}"])
def test_commands_refuse_an_output_in_one_line_before_they_work(
    tmp_path, monkeypatch, capsys, command, output, forget_datasets
):
    forget({name for name in DatasetCatalog.list() if name.startswith("photo_digits")})  # of other folders
    monkeypatch.setattr("sys.argv", ["d2kd"])
    monkeypatch.chdir(tmp_path)
    image = tmp_path / "image.png"
    assert cv2.imwrite(str(image), np.zeros((32, 32, 3), np.uint8))
    words = command.format(output.format(image=image), image=image).split()
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    printed = capsys.readouterr()
    last = (printed.out + printed.err).splitlines()[-1]
    assert end.value.code == 2 and output.format(image=image) in last
    assert "cannot be written" in last or "is a file: name a folder" in last
    assert list(tmp_path.iterdir()) == [image]
