"""The page on photographs of one's own: its commands run in their order, and what it names is read."""

import re
import shlex

import cv2
import numpy as np
import pytest
import yaml
from models import config
from photographs import CLASSES, write_photographs, write_voc, write_yolo
from runs import ROOT, forget

from d2kd import cli
from d2kd.data.datasets import register_datasets
from d2kd.engine import load_config
from d2kd.errors import ConfigError
from detectron2.data import DatasetCatalog

PAGE = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for language, block in BLOCKS
    if language == "bash"
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
#: One iteration on small images, without weights of others.
QUICK = {
    "MODEL.DEVICE": "cpu",
    "MODEL.FPN.OUT_CHANNELS": "32",
    "MODEL.RETINANET.NUM_CONVS": "1",
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MIN_SIZE_TEST": "64",
    "SOLVER.MAX_EPOCHS": "1",
    "SOLVER.IMS_PER_BATCH": "2",
    "DATALOADER.NUM_WORKERS": "0",
}


@pytest.fixture
def desk(tmp_path, monkeypatch, forget_datasets):
    """A working directory with photographs/ and the YAMLs of the page, whose recipes are made quick."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["d2kd"])
    forget({"photographs_train", "photographs_val"})  # of recipes that were read when tests were collected
    folder = tmp_path / "photographs"
    for split, count, seed in (("train", 5, 1), ("val", 3, 2)):
        content = write_photographs(folder, split, count, seed)
        write_yolo(folder, split, content)
        write_voc(folder, split, content)
        for image in content["images"]:
            labels = np.zeros((image["height"], image["width"]), np.uint8)
            target = folder / "maps" / split / image["file_name"].replace(".jpg", ".png")
            target.parent.mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(target), labels)
        for name in CLASSES:
            target = folder / "crops" / split / name / "1.png"
            target.parent.mkdir(parents=True)
            assert cv2.imwrite(str(target), np.zeros((8, 8, 3), np.uint8))
    for language, block in BLOCKS:
        if language == "yaml" and block.startswith("# "):
            (tmp_path / block.splitlines()[0][2:]).write_text(block)
    return tmp_path


def run(arguments, *options):
    """A command of the page, in this process."""
    assert arguments[0] == "d2kd"
    try:
        assert cli.main([*arguments[1:], *options]) == 0
    except SystemExit as end:
        raise AssertionError(f"{shlex.join(arguments)} ended with {end.code}") from end


def test_every_command_of_the_page_runs(desk, capsys):
    quick = [word for item in QUICK.items() for word in item]
    teacher = ["DISTILL.TEACHER.OPTS", str(["MODEL.FPN.OUT_CHANNELS", 32, "MODEL.RETINANET.NUM_CONVS", 1])]
    for command in COMMANDS:
        weights = [] if "MODEL.WEIGHTS" in command else ["MODEL.WEIGHTS", ""]
        if command[1] in ("train", "eval"):
            run(command, *weights, *quick, *(teacher if "--teacher-config" in command else []))
        elif command[1] == "data":
            run(command, "MODEL.DEVICE", "cpu")
        else:
            export = command[1] == "export"
            run(command, *(["MODEL.FPN.OUT_CHANNELS", "32", "MODEL.RETINANET.NUM_CONVS", "1"] if export else []))
    assert {command[1] for command in COMMANDS} == {"data", "train", "report", "export", "eval"}
    printed = capsys.readouterr().out
    assert "photographs_train (DATASETS.TRAIN): 5 images, 12 objects of 3 classes" in printed
    assert (desk / "sheet.png").is_file() and (desk / "output/report/report.md").is_file()
    assert (desk / "student.pth").is_file() and (desk / "output/student/inference").is_dir()


def test_every_format_of_the_page_is_read(desk):
    entries = next(yaml.safe_load(block)["REGISTER"] for language, block in BLOCKS if block.startswith("REGISTER"))
    register_datasets(config(DATASETS__REGISTER=entries))
    counts = {entry["FORMAT"]: len(DatasetCatalog.get(entry["NAME"])) for entry in entries}
    assert counts == {"coco": 5, "yolo": 5, "voc": 5, "labelmaps": 5, "folders": 3}


def test_a_base_may_be_a_recipe(desk):
    assert load_config("student.yaml").MODEL.RESNETS.DEPTH == 18
    (desk / "wrong.yaml").write_text("_BASE_: configs/OwnData/retinanet_R60.yaml\n")
    with pytest.raises(ConfigError, match="retinanet_R60.yaml"):
        load_config("wrong.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "configs/OwnData").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_short_and_begin_with_a_comment(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 20 and lines[0].startswith("# ")


@pytest.mark.parametrize("kind", ["", "_scratch"])
def test_recipes_are_a_pair(kind):
    student, alone, teacher = (
        load_config(str(ROOT / f"configs/OwnData/retinanet_{name}{kind}.yaml"))
        for name in ("R18_R50_FeatureMimic", "R18", "R50")
    )
    assert student.DISTILL.TEACHER.CONFIG_FILE.endswith(f"OwnData/retinanet_R50{kind}.yaml")
    assert student.DATASETS == alone.DATASETS == teacher.DATASETS and student.SOLVER == alone.SOLVER
    assert bool(alone.MODEL.WEIGHTS) is not bool(kind) and teacher.MODEL.RESNETS.DEPTH == 50
    # what is frozen without weights would stay random
    assert (alone.MODEL.BACKBONE.FREEZE_AT, alone.MODEL.RESNETS.NORM) == ((0, "BN") if kind else (2, "FrozenBN"))
