"""PhotoDigits: reproducible, disjoint splits, consistent annotations, safe on disk."""

import errno
import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

SCRIPT = Path(__file__).parents[2] / "datasets" / "prepare_photo_digits.py"
SMALL = ["--num-train", "24", "--num-val", "12", "--num-test", "6", "--image-size", "96", "--workers", "1"]
#: SHA-256 of the images, label maps, crops and annotations of train that version 1 made with the numbers of SMALL.
TRAIN = "7d323975f89e3cdeac14cd6a9c60dcd50a54fc1d82c650b282502184f0959eca"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("prepare_photo_digits", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def dataset(script, tmp_path_factory):
    output = tmp_path_factory.mktemp("data") / "photo_digits"
    script.main(["--output", str(output), *SMALL])
    return output


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_bytes_depend_on_seed_but_not_on_workers(script, dataset, tmp_path):
    script.main(["--output", str(tmp_path / "again"), *SMALL[:-1], "2"])
    assert contents(tmp_path / "again") == contents(dataset)
    other = tmp_path / "other"
    script.main(["--output", str(other), *SMALL, "--seed", "1"])
    descriptions = [json.loads((directory / "dataset.json").read_text()) for directory in (dataset, other)]
    assert descriptions[0]["checksum"] != descriptions[1]["checksum"]


@pytest.mark.parametrize("split,count", [("train", 24), ("val", 12), ("test", 6)])
def test_annotations_agree_with_images_and_label_maps(dataset, split, count):
    coco = COCO(dataset / "annotations" / f"instances_{split}.json")
    assert [coco.cats[i]["name"] for i in sorted(coco.cats)] == [str(d) for d in range(10)]
    assert sorted(coco.cats) == list(range(1, 11)) and len(coco.imgs) == count
    for image_id, image in coco.imgs.items():
        pixels = cv2.imread(str(dataset / split / image["file_name"]))
        labels = cv2.imread(str(dataset / f"semseg_{split}" / image["file_name"]), cv2.IMREAD_UNCHANGED)
        assert pixels.shape == (96, 96, 3) and labels.shape == (96, 96) and labels.dtype == np.uint8
        redrawn = np.zeros_like(labels)
        annotations = coco.imgToAnns[image_id]
        assert 1 <= len(annotations) <= 5
        for item in annotations:
            mask = coco.annToMask(item).astype(bool)
            assert not redrawn[mask].any()
            redrawn[mask] = item["category_id"]
            assert item["area"] == mask.sum()
            assert item["bbox"] == coco_mask.toBbox(coco_mask.encode(np.asfortranarray(mask))).tolist()
        assert np.array_equal(redrawn, labels)


def test_holes_survive_polygons(script):
    mask = np.zeros((20, 20), bool)
    mask[2:18, 3:16] = True
    mask[4:8, 5:9] = mask[10:15, 6:12] = False
    mask[0, 19] = True
    rle = coco_mask.merge(coco_mask.frPyObjects(script.polygons(mask), 20, 20))
    assert np.array_equal(coco_mask.decode(rle).astype(bool), mask)


def test_splits_share_no_digit_and_no_part_of_a_photo(script, monkeypatch):
    photo = np.arange(427 * 640).reshape(427, 640)  # each pixel is a number of its own
    monkeypatch.setattr("sklearn.datasets.load_sample_images", lambda: SimpleNamespace(images=[photo, photo]))
    sources = script.load_sources(seed=3)
    digits = [{digit.tobytes() for digit in source.digits} for source in sources]
    assert sum(map(len, digits)) == len(set().union(*digits)) == 1797
    for regions in zip(*(source.photos for source in sources)):
        assert min(min(region.shape) for region in regions) >= script.PHOTO_CROP[1]
        assert sorted(np.concatenate([region.ravel() for region in regions])) == list(range(photo.size))


def test_val_and_test_have_half_of_every_digit(script):
    _, val, test = script.load_sources(seed=0)
    counts = [np.bincount(source.labels, minlength=10) for source in (val, test)]
    assert abs(counts[0] - counts[1]).max() <= 1 and abs(len(val.labels) - len(test.labels)) <= 2
    assert counts[0].min() >= 10


def test_train_is_what_it_was_before_there_was_a_test_split(script, dataset):
    from sklearn.datasets import load_digits, load_sample_images

    data = load_digits()
    order = np.random.default_rng(0).permutation(1797)[359:]
    train = script.load_sources(seed=0)[0]
    assert np.array_equal(train.digits, (data.images[order] / 16).astype(np.float32))
    assert np.array_equal(train.labels, data.target[order])
    for photo, region in zip(load_sample_images().images, train.photos):
        assert np.array_equal(region, photo[:, :480])
    description = json.loads((dataset / "annotations/instances_train.json").read_text())["info"]
    assert description["version"] == 1 and "num_test" not in description["parameters"]
    if cv2.__version__ == "5.0.0":  # others encode otherwise
        assert checksum(dataset) == TRAIN


def checksum(directory: Path) -> str:
    """Of the files of train."""
    names = ("train/", "semseg_train/", "classification/train/", "annotations/instances_train.json")
    digest = hashlib.sha256()
    for name, content in contents(directory).items():
        if name.startswith(names):
            digest.update(name.encode() + content)
    return digest.hexdigest()


def test_digits_keep_contrast_and_distance(script):
    train, *_ = script.load_sources(seed=0)
    rng = np.random.default_rng(0)
    behind = rng.uniform(0, 255, size=(1, 3)).astype(np.float32).repeat(200, 0)
    color = script.contrasting_color(behind, rng)
    assert np.linalg.norm(color - behind[0]) >= script.MIN_CONTRAST
    for seed in range(20):
        scene = script.render_scene(train, 128, np.random.default_rng(seed))
        for mask, area in zip(scene.masks, scene.areas):
            assert mask.sum() >= script.MIN_VISIBLE * area


def test_crops_are_sorted_by_digit(dataset):
    coco = COCO(dataset / "annotations" / "instances_train.json")
    crops = list((dataset / "classification" / "train").glob("*/*.png"))
    assert crops
    for path in crops:
        image, number = path.stem.split("_")
        assert coco.imgToAnns[int(image)][int(number)]["category_id"] == int(path.parent.name) + 1
        assert cv2.imread(str(path)).shape == (64, 64, 3)


def test_finished_dataset_is_kept_unless_forced(script, dataset, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("built again")

    monkeypatch.setattr(script, "build_dataset", fail)
    before = contents(dataset)
    script.main(["--output", str(dataset), *SMALL])
    with pytest.raises(RuntimeError, match="built again"):
        script.main(["--output", str(dataset), *SMALL, "--force"])
    assert contents(dataset) == before
    assert [p.name for p in dataset.parent.iterdir()] == [dataset.name]


def test_other_data_is_never_replaced(script, dataset, tmp_path, capsys):
    (tmp_path / "precious.txt").write_text("x")
    for arguments in ([str(tmp_path), "--force"], [str(dataset), *SMALL, "--seed", "5"]):
        with pytest.raises(SystemExit):
            script.main(["--output", *arguments])
    messages = capsys.readouterr().err
    assert "not a PhotoDigits dataset" in messages and "other parameters" in messages
    assert (tmp_path / "precious.txt").exists()


def test_a_place_that_takes_no_folders_is_one_line(script, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        script.main(["--output", str(tmp_path / "file/below"), *SMALL])
    assert end.value.code == 2 and "cannot be written: " in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def outdated(script, dataset, tmp_path):
    """A dataset as version 1 described it, whose images are not looked at."""
    output = tmp_path / "photo_digits"
    (output / "train").mkdir(parents=True)
    description = json.loads((dataset / "dataset.json").read_text())
    description["version"] = 1
    del description["parameters"]["num_test"]
    (output / "dataset.json").write_text(json.dumps(description))
    return output


def test_a_dataset_of_version_1_is_made_again_in_place(script, dataset, outdated):
    script.main(["--output", str(outdated), *SMALL])
    assert contents(outdated) == contents(dataset)
    assert [p.name for p in outdated.parent.iterdir()] == ["photo_digits"]


def test_a_dataset_of_version_1_with_other_parameters_is_not_replaced(script, outdated, capsys):
    before = contents(outdated)
    with pytest.raises(SystemExit):
        script.main(["--output", str(outdated), *SMALL, "--num-train", "25"])
    assert "other parameters" in capsys.readouterr().err and contents(outdated) == before


def test_processes_that_replace_a_dataset_at_once_do_not_fail(script, outdated):
    """The other one puts its own there between our two renames; ours comes after it."""
    rename, others = Path.rename, iter(["others"] * 3)

    def late(self, target):
        result = rename(self, target)
        if self == outdated and next(others, None):
            outdated.mkdir()
            (outdated / "theirs").touch()
        return result

    with pytest.MonkeyPatch.context() as patch, script.replacing(outdated) as fresh:
        patch.setattr(Path, "rename", late)
        (fresh / "ours").touch()
    assert [p.name for p in outdated.iterdir()] == ["ours"]
    assert [p.name for p in outdated.parent.iterdir()] == ["photo_digits"]


def test_a_dataset_stays_where_its_successor_cannot_take_its_place(script, outdated, monkeypatch):
    before, rename = contents(outdated), Path.rename

    def full(self, target):
        if ".new-" in self.name:
            raise OSError(errno.ENOSPC, "disk is full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="disk is full"), script.replacing(outdated):
        pass
    assert contents(outdated) == before
    assert [p.name for p in outdated.parent.iterdir()] == ["photo_digits"]


def test_forced_rebuild_replaces(script, tmp_path):
    output = tmp_path / "photo_digits"
    tiny = ["--output", str(output), "--num-val", "1", "--num-test", "1", "--image-size", "48", "--workers", "1"]
    script.main([*tiny, "--num-train", "3"])
    script.main([*tiny, "--num-train", "2", "--force"])
    assert len(list((output / "train").iterdir())) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["photo_digits"]


def test_impossible_parameters_are_named(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(["--output", str(tmp_path / "x"), "--image-size", "4"])
    assert "--image-size is 4" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
