"""Datasets from the config, the checks before training, and images that cannot be read."""

import copy
import json
import logging
import pickle

import numpy as np
import pytest
from PIL import Image

from d2kd.config import add_distill_config
from d2kd.data.classes import check_classes
from d2kd.data.coco import validate_coco_json
from d2kd.data.datasets import (
    DATASET_FORMATS,
    DatasetError,
    DatasetFormat,
    check_datasets,
    register_datasets,
)
from d2kd.data.loader import ResumableLoader
from d2kd.data.mapper import wrap_mapper
from d2kd.errors import ConfigError
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MapDataset, MetadataCatalog
from detectron2.data.samplers import TrainingSampler

pytestmark = pytest.mark.usefixtures("forget_datasets")

COCO = {
    "images": [{"id": 3, "file_name": "a.png", "height": 20, "width": 30}],
    "annotations": [{"id": 1, "image_id": 3, "category_id": 2, "bbox": [1, 2, 10, 10], "iscrowd": 0}],
    "categories": [{"id": 2, "name": "two"}, {"id": 1, "name": "one"}],
}


@pytest.fixture
def folder(tmp_path):
    """A sound dataset: ann.json and images/a.png."""
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    Image.fromarray(pixels).save(tmp_path / "images" / "a.jpg")
    (tmp_path / "ann.json").write_text(json.dumps(COCO))
    return tmp_path


def config(folder, *, train=("mine",), test=(), **entry):
    cfg = get_cfg()
    add_distill_config(cfg)
    entry = {"NAME": "mine", "JSON": str(folder / "ann.json"), "IMAGES": str(folder / "images"), **entry}
    cfg.DATASETS.REGISTER = [{k: v for k, v in entry.items() if v is not None}]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = train, test
    return cfg


def edit(folder, change):
    """Writes ann.json with a change to the sound content."""
    content = copy.deepcopy(COCO)
    result = change(content)
    (folder / "ann.json").write_text(json.dumps(content if result is None else result))
    return str(folder / "ann.json")


# --- Registering -------------------------------------------------------------------


def test_register_and_load(folder):
    cfg = config(folder, test=("mine",))
    register_datasets(cfg)
    register_datasets(cfg)
    check_datasets(cfg)
    (record,) = DatasetCatalog.get("mine")
    assert record["file_name"] == str(folder / "images" / "a.png")
    assert record["annotations"][0]["category_id"] == 1
    assert MetadataCatalog.get("mine").thing_classes == ["one", "two"]


def test_register_from_yaml(folder, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "DATASETS:\n  REGISTER:\n"
        f"  - {{NAME: mine, JSON: {folder / 'ann.json'}, IMAGES: {folder / 'images'}}}\n  TRAIN: [mine]\nVERSION: 2\n"
    )
    cfg = get_cfg()
    add_distill_config(cfg)
    cfg.merge_from_file(str(path))
    register_datasets(cfg)
    check_datasets(cfg)
    assert len(DatasetCatalog.get("mine")) == 1


@pytest.mark.parametrize("name", ["mine", "coco_2017_val"])
def test_a_name_keeps_its_definition(folder, name):
    register_datasets(config(folder))
    with pytest.raises(DatasetError, match=f"dataset '{name}' exists already"):
        register_datasets(config(folder, NAME=name, IMAGES=str(folder)))


@pytest.mark.parametrize(
    "entry, match",
    [
        ({"IMAGE": "x"}, "unknown key 'IMAGE'.*Did you mean IMAGES"),
        ({"json": "x"}, "unknown key 'json'.*Did you mean JSON"),
        ({"JSON": None}, "no JSON"),
        ({"NAME": 3}, "NAME = 3"),
        ({"IMAGES": ""}, "IMAGES = ''"),
    ],
)
def test_malformed_entries(folder, entry, match):
    with pytest.raises(DatasetError, match=match):
        register_datasets(config(folder, **entry))
    assert "mine" not in DatasetCatalog


def test_an_entry_must_be_a_mapping(folder):
    cfg = config(folder)
    cfg.DATASETS.REGISTER = ["mine"]
    with pytest.raises(DatasetError, match=r"DATASETS\.REGISTER\[0\] must be a mapping"):
        register_datasets(cfg)


def test_relative_paths(folder, monkeypatch, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("cwd")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(folder))
    cfg = config(folder, JSON="ann.json", IMAGES="images")
    register_datasets(cfg)
    check_datasets(cfg)
    assert DatasetCatalog.get("mine")[0]["file_name"] == str(folder / "images" / "a.png")
    # The working directory comes first.
    (elsewhere / "ann.json").write_text(json.dumps(COCO))
    register_datasets(config(folder, NAME="near", JSON="ann.json", IMAGES="images"))
    assert MetadataCatalog.get("near").json_file == "ann.json"


def test_missing_files_name_all_places_tried(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DETECTRON2_DATASETS", "/data/sets")
    cfg = config(folder, JSON="nowhere.json")
    register_datasets(cfg)
    with pytest.raises(DatasetError) as e:
        check_datasets(cfg)
    assert str(folder / "nowhere.json") in str(e.value) and "/data/sets/nowhere.json" in str(e.value)
    check_datasets(config(folder, train=(), JSON="nowhere.json"))  # not used


def test_unknown_dataset_names(folder):
    cfg = config(folder, train=("mime",))
    register_datasets(cfg)
    with pytest.raises(DatasetError, match=r"'mime' of DATASETS\.TRAIN is not registered.*Did you mean mine"):
        check_datasets(cfg)


def test_only_the_asked_splits_are_checked(folder):
    cfg = config(folder, train=("gone",), test=("mine",))
    register_datasets(cfg)
    check_datasets(cfg, ["TEST"])
    with pytest.raises(DatasetError, match="'gone'"):
        check_datasets(cfg)


# --- COCO files --------------------------------------------------------------------


def test_a_sound_file(folder, caplog):
    summary = validate_coco_json(str(folder / "ann.json"), str(folder / "images"))
    assert summary == (1, 1, ["one", "two"], 0, 1)
    assert [r.getMessage().partition(": ")[2] for r in caplog.records] == [
        "1 of 2 classes have no objects: one. Nothing is learned of them."
    ]


def test_files_that_are_not_there_or_not_json(folder):
    with pytest.raises(DatasetError, match="gone.json does not exist"):
        validate_coco_json(str(folder / "gone.json"))
    with pytest.raises(DatasetError, match="is a directory"):
        validate_coco_json(str(folder))
    for content in (b"", b'{"images": [', b"\xff\xd8\xff\xe0 a picture"):
        (folder / "ann.json").write_bytes(content)
        with pytest.raises(DatasetError, match="ann.json is not JSON"):
            validate_coco_json(str(folder / "ann.json"))


def repeat(section, **changes):
    return lambda c: c[section].append({**c[section][0], **changes})


def assign(section, **changes):
    return lambda c: c[section][0].update(changes)


def drop(section, key):
    return lambda c: c[section][0].pop(key) and None


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda c: [c], "top level is a list"),
        (lambda c: c.pop("images") and None, "no 'images'"),
        (lambda c: c.pop("annotations") and None, "no 'annotations'"),
        (lambda c: c.pop("categories") and None, "no 'categories'"),
        (lambda c: c.update(images={"a": 1}), "'images' is a dict, not a list"),
        (lambda c: c.update(images=[]), "lists no images"),
        (lambda c: c["images"].append("a.png"), r"images\[1\] is 'a.png'"),
        (drop("images", "height"), r"images\[0\] \(id 3\) lacks \['height'\]"),
        (drop("annotations", "bbox"), r"annotations\[0\] \(id 1\) lacks \['bbox'\]"),
        (drop("categories", "id"), r"categories\[0\] lacks \['id'\]"),
        (assign("images", width="30"), r"width = '30'.*int or float and positive"),
        (assign("images", width=0), "width = 0.*positive"),
        (assign("images", file_name=4), "file_name = 4"),
        (assign("annotations", image_id=None), "image_id = None"),
        (assign("annotations", category_id=True), "category_id = True"),
        (assign("annotations", bbox={}), "bbox = {}"),
        (repeat("images"), r"1 of the 2 images repeat an id, first id 3"),
        (repeat("annotations"), r"1 of the 2 annotations repeat an id, first id 1"),
        (repeat("categories"), r"1 of the 3 categories repeat an id, first id 2"),
        (repeat("annotations", id=5, image_id=8), r"1 of 2 .* first annotation \(id 5\) with image_id 8"),
        (repeat("annotations", id=5, category_id=7), r"1 of 2 .* first annotation \(id 5\) with category_id 7"),
        (repeat("annotations", id=5, bbox=[1, 2, 3]), r"annotation \(id 5\).*\[1, 2, 3\].*four finite numbers"),
        (assign("annotations", bbox=[1, 2, 3]), r"annotation \(id 1\).*four finite numbers"),
        (assign("annotations", bbox=[1, 2, "3", 4]), r"annotation \(id 1\).*four finite numbers"),
        (assign("annotations", bbox=[1, 2, None, 3]), r"annotation \(id 1\).*four finite numbers"),
        (assign("annotations", bbox=[[1, 2], 3, 4, 5]), r"annotation \(id 1\).*four finite numbers"),
        (assign("annotations", bbox=[1, 2, float("nan"), 3]), "four finite numbers"),
        (assign("annotations", bbox=[-1.5, 2, 5, 5]), r"1 of 1 boxes .* a.png, which is 30 x 20"),
        (repeat("annotations", id=5, bbox=[1, 2, 30.5, 5]), r"1 of 2 boxes .* \(id 5\) with bbox \[1, 2, 30.5, 5\]"),
        (assign("annotations", bbox=[1, 2, 5, 19.5]), "outside"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(folder, change, match):
    with pytest.raises(DatasetError, match=match) as e:
        validate_coco_json(edit(folder, change))
    assert "ann.json" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("bbox", [[-1, -1, 32, 22], [0, 0, 30, 20]])
def test_boxes_may_round(folder, bbox):
    validate_coco_json(edit(folder, assign("annotations", bbox=bbox)))


def test_empty_boxes_are_a_warning(folder, caplog):
    validate_coco_json(edit(folder, repeat("annotations", id=5, bbox=[4, 4, 0, 3])))
    assert "1 of 2 boxes have no positive width" in caplog.text and "(id 5)" in caplog.text


def test_no_annotations_at_all(folder):
    assert validate_coco_json(edit(folder, lambda c: c.update(annotations=[]))).num_annotations == 0
    path = edit(folder, lambda c: c.pop("annotations") and None)
    assert validate_coco_json(path, need_annotations=False).num_images == 1


def test_missing_images(folder, caplog):
    path = edit(folder, repeat("images", id=4, file_name="sub/b.png"))
    with pytest.raises(DatasetError, match=r"1 of the 2 images .* first sub/b.png \(id 4\)"):
        validate_coco_json(path, str(folder / "images"))
    validate_coco_json(path, str(folder / "images"), missing_images="warn")
    assert "sub/b.png" in caplog.text
    with pytest.raises(DatasetError, match="Image folder .*gone"):
        validate_coco_json(path, str(folder / "gone"))
    (folder / "images" / "sub").mkdir()
    (folder / "images" / "a.png").rename(folder / "images" / "sub" / "b.png")
    Image.new("RGB", (30, 20)).save(folder / "images" / "a.png")
    validate_coco_json(path, str(folder / "images"))


def test_missing_images_may_be_skipped_in_training_only(folder):
    edit(folder, repeat("images", id=4, file_name="b.png"))
    cfg = config(folder)
    cfg.DATASETS.ON_BAD_IMAGE = "skip"
    register_datasets(cfg)
    check_datasets(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), ("mine",)
    with pytest.raises(DatasetError, match="b.png"):
        check_datasets(cfg)


# --- Class counts ------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture, node", [("RetinaNet", "RETINANET"), ("GeneralizedRCNN", "ROI_HEADS"), ("PanopticFPN", "ROI_HEADS")]
)
@pytest.mark.parametrize("checked", [True, False])
def test_class_counts(folder, architecture, node, checked):
    cfg = config(folder)
    register_datasets(cfg)
    if checked:
        check_datasets(cfg)
    cfg.MODEL.META_ARCHITECTURE = architecture
    with pytest.raises(DatasetError, match=rf"2 classes \(one, two.*MODEL\.{node}\.NUM_CLASSES is 80"):
        check_classes(cfg)
    cfg.MODEL[node].NUM_CLASSES = 2
    check_classes(cfg)


def test_stuff_class_counts():
    MetadataCatalog.get("stuff_set").stuff_classes = ["a", "b", "c"]
    cfg = get_cfg()
    add_distill_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    cfg.DATASETS.TEST = ("stuff_set",)
    with pytest.raises(DatasetError, match=r"3 classes \(a, b, c.*MODEL\.SEM_SEG_HEAD\.NUM_CLASSES is 54"):
        check_classes(cfg)
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
    check_classes(cfg)
    MetadataCatalog.remove("stuff_set")


def test_models_without_classes_are_not_checked(folder):
    cfg = config(folder)
    register_datasets(cfg)
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    check_classes(cfg)


# --- Bad images --------------------------------------------------------------------


def truncated(name):
    return lambda images: (images / name).write_bytes((images / name).read_bytes()[:-300])


DAMAGE = {
    "png": ("a.png", truncated("a.png")),
    "jpg": ("a.jpg", truncated("a.jpg")),
    "empty": ("a.png", lambda images: (images / "a.png").write_bytes(b"")),
    "text": ("a.png", lambda images: (images / "a.png").write_text("not found")),
    "gone": ("a.png", lambda images: (images / "a.png").unlink()),
    "size": ("a.png", lambda images: Image.new("RGB", (31, 20)).save(images / "a.png")),
}


def record_of(folder, name="a.png"):
    return {"file_name": str(folder / "images" / name), "height": 20, "width": 30, "image_id": 3, "annotations": []}


def plain_mapper():
    return DatasetMapper(True, augmentations=[], image_format="BGR")


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_images(folder, damage, caplog):
    name, spoil = DAMAGE[damage]
    record = record_of(folder, name)
    assert wrap_mapper(plain_mapper(), "error")(record)["image"].shape == (3, 20, 30)
    spoil(folder / "images")
    with pytest.raises(DatasetError, match=rf"Image .*{name}.*DATASETS\.ON_BAD_IMAGE\b"):
        wrap_mapper(plain_mapper(), "error")(record)
    mapper = wrap_mapper(plain_mapper(), "skip")
    with caplog.at_level(logging.WARNING, "d2kd"):
        assert mapper(record) is None and mapper(record) is None
    (logged,) = caplog.records
    assert name in logged.getMessage()


def test_bad_label_map(folder):
    (folder / "label.png").write_bytes(b"")
    record = {**record_of(folder), "sem_seg_file_name": str(folder / "label.png")}
    with pytest.raises(DatasetError, match="Label map .*label.png"):
        wrap_mapper(plain_mapper(), "error")(record)


def test_another_image_takes_the_place(folder):
    (folder / "images" / "bad.png").write_bytes(b"")
    dataset = MapDataset([record_of(folder, "bad.png"), record_of(folder)], wrap_mapper(plain_mapper(), "skip"))
    assert dataset[0]["file_name"].endswith("a.png")


def test_other_errors_pass_unchanged(folder):
    def broken(record):
        raise KeyError("a programming error")

    for policy in ("error", "skip"):
        with pytest.raises(KeyError, match="programming"):
            wrap_mapper(broken, policy)(record_of(folder))


def test_policy_and_pickling():
    with pytest.raises(ValueError, match=r"DATASETS\.ON_BAD_IMAGE is 'ignore'.*error, skip"):
        wrap_mapper(plain_mapper(), "ignore")
    assert pickle.loads(pickle.dumps(wrap_mapper(plain_mapper(), "skip"))).skip


@pytest.mark.parametrize("record", [{}, {"width": 3, "height": 2}], ids=["without sizes", "one image"])
def test_batches_of_one_image_that_may_not_tell_its_size(record):
    loader = ResumableLoader([record], dict, lambda seed: TrainingSampler(1, seed=seed), batch_size=3)
    assert next(iter(loader)) == [record] * 3


def test_a_format_of_ones_own(tmp_path, monkeypatch):
    def registering(**entry):
        cfg = get_cfg()
        add_distill_config(cfg)
        cfg.DATASETS.REGISTER = [entry]
        return cfg

    calls = []
    folder = DatasetFormat(("IMAGES",), lambda *given: calls.append(given))
    monkeypatch.setitem(DATASET_FORMATS, "folder", folder)
    register_datasets(registering(NAME="mine_in_a_folder", FORMAT="folder", IMAGES=str(tmp_path)))
    assert calls == [("mine_in_a_folder", str(tmp_path))]
    with pytest.raises(DatasetError, match=r"DATASETS\.REGISTER\[0\] has no IMAGES. Each entry needs NAME, IMAGES,"):
        register_datasets(registering(NAME="x", FORMAT="folder"))
    with pytest.raises(ConfigError, match=r"DATASETS\.REGISTER\[0\]\.FORMAT is 'foldr'.*coco.*Did you mean folder"):
        register_datasets(registering(NAME="x", FORMAT="foldr", IMAGES="y"))
