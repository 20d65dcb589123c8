"""Damaged files and odd content beyond the cases of cases.py: one line that names them, or read as what is meant."""

import json
import os
import struct
import zlib

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from cases import EXIF_ORIENTATION, SIZE, decode, encode, runs_of, sound_split, write_case
from models import RETINANET, config
from PIL import Image, ImageOps
from runs import tool

from d2kd.data.classes import check_classes
from d2kd.data.coco import DatasetError, load_coco, read_coco, usable_segmentation, validate_coco_json
from d2kd.data.datasets import check_datasets, register_datasets
from d2kd.data.images import LabelMapError, LabelRange, image_problem, image_size, read_label_map
from d2kd.data.images import read_image as whole_image
from d2kd.data.mapper import ImageMapper, wrap_mapper
from d2kd.evaluation.coco import CocoEvaluator, NumberedCOCO
from detectron2.data import MetadataCatalog, detection_utils
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image

pytestmark = pytest.mark.usefixtures("forget_datasets")


def noise(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def flipped(data: bytes) -> bytes:
    """A file with one wrong byte in its middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb() -> bytes:
    """A small PNG file of 60000 x 60000 pixels."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    content = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


# --- Images ------------------------------------------------------------------------

DAMAGED = {
    "empty": (b"", "the file is empty"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "web page": (b"<!DOCTYPE html><html></html>", "web page"),
    "zip": (b"PK\x03\x04" + bytes(40), "compressed"),
    "text": (b"nothing", "no known image format"),
    "zeros": (bytes(500), "no known image format"),
    "png cut": (encode(noise())[:-200], "truncated"),
    "png cut in its header": (encode(noise())[:20], "Truncated"),
    "png with a wrong byte": (flipped(encode(noise())), "data stream"),
    "jpeg cut": (encode(noise(), "jpeg")[:-200], "truncated"),
    "webp cut": (encode(noise(), "webp")[:-200], "decoder"),
    "bmp cut": (encode(noise(), "bmp")[:-200], "truncated"),
    "gif cut": (encode(noise(), "gif")[:-200], "truncated"),
    "tiff cut": (encode(noise(), "tiff")[:-2000], "truncated"),
    "bomb": (bomb(), "exceeds limit"),
}


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_image_is_named_in_one_line(kind, is_train, tmp_path):
    data, words = DAMAGED[kind]
    (tmp_path / "a\nb.png").write_bytes(data)
    record = {"file_name": str(tmp_path / "a\nb.png"), "width": 40, "height": 30, "annotations": []}
    guarded = wrap_mapper(ImageMapper(config(), is_train), "error", evaluates=not is_train)
    with pytest.raises(DatasetError) as error:
        guarded(record)
    assert r"a\nb.png' cannot be read (" in str(error.value) and words in str(error.value)
    assert str(error.value).isprintable()
    assert ("DATASETS.ON_BAD_IMAGE" in str(error.value)) == is_train
    skipping = wrap_mapper(ImageMapper(config(), is_train), "skip")
    assert skipping(record) is None


def test_damage_within_a_png_file_does_not_give_half_an_image(tmp_path):
    (tmp_path / "a.png").write_bytes(flipped(encode(noise())))
    with pytest.raises(OSError, match="data stream"):
        read_image(str(tmp_path / "a.png"), "BGR")


@pytest.mark.parametrize("size, wrong", [((30, 40), False), ((40, 30), True)])
@pytest.mark.parametrize("behind", [True, False], ids=["behind the pixels", "in front"])
def test_exif_orientation_of_a_png_file(size, wrong, behind, tmp_path):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    data = encode(noise(), exif=None if behind else exif.tobytes())
    end = png_chunk(b"IEND", b"")
    if behind:
        data = data.removesuffix(end) + png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + end
    (tmp_path / "a.png").write_bytes(data)
    record = {"file_name": str(tmp_path / "a.png"), "width": size[0], "height": size[1]}
    guarded = wrap_mapper(ImageMapper(config(), False), "error")
    if wrong:
        with pytest.raises(DatasetError, match="30 x 40 .* say 40 x 30: .* swapped by its EXIF orientation 6"):
            guarded(record)
    else:
        height, width = guarded(record)["image"].shape[1:]
        assert height > width


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_files_are_turned_once(orientation, tmp_path):
    path, exif = str(tmp_path / "a.tiff"), Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    noise().convert("L").save(path, exif=exif)
    upright = np.array(ImageOps.exif_transpose(decode(encode(noise().convert("L"), exif=exif))))
    size = upright.shape[::-1]
    assert image_size(path) == size
    assert image_problem(path, size) is None and image_problem(path, size, decode=True) is None
    np.testing.assert_array_equal(read_label_map(path), upright)
    record = {"file_name": path, "width": size[0], "height": size[1]}
    np.testing.assert_array_equal(whole_image(path, "BGR")[..., 0], upright)
    guarded = wrap_mapper(ImageMapper(config(INPUT__MIN_SIZE_TEST=0), False), "error")
    assert guarded(record)["image"].shape[1:] == upright.shape
    assert "swapped" in image_problem(path, size[::-1])
    assert ("by its EXIF orientation" in image_problem(path, size[::-1])) == (orientation > 4)


def test_the_check_before_training_decodes_no_sound_png(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encode(noise(30, 30)))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert image_problem(str(tmp_path / "a.png"), (30, 30)) is None


@pytest.mark.parametrize(
    "image",
    [
        encode(noise().convert("CMYK"), "jpeg"),
        encode(noise().convert("LA")),
        encode(noise().convert("RGBA")),
        encode(noise().convert("P")),
        encode(noise().convert("1")),
        encode(noise(), "gif", save_all=True, append_images=[noise().rotate(90)]),
        encode(noise(), "webp", lossless=True),
        encode(noise(), "mpo", save_all=True, append_images=[noise()]),
        encode(noise()) + b"more",
        encode(noise(), "jpeg") + bytes(500),
        encode(noise(), "jpeg", exif=b"Exif\0\0II*\0damaged"),
    ],
    ids=["cmyk", "la", "rgba", "palette", "1 bit", "gif", "webp", "mpo", "png and more", "jpeg and more", "exif"],
)
def test_odd_images_that_are_sound(image, tmp_path):
    (tmp_path / "a.png").write_bytes(image)
    record = {"file_name": str(tmp_path / "a.png"), "width": 40, "height": 30}
    assert wrap_mapper(ImageMapper(config(), False), "error")(record)["image"].shape[0] == 3


@pytest.mark.parametrize("kind", [".png", ".tiff"])
def test_colors_of_16_bits_are_scaled_to_8(kind, tmp_path):
    pixels = np.asarray(noise())
    _, data = cv2.imencode(kind, pixels.astype(np.uint16) * 257)  # in BGR
    (tmp_path / f"a{kind}").write_bytes(data.tobytes())
    record = {"file_name": str(tmp_path / f"a{kind}"), "width": 40, "height": 30}
    cfg = config(INPUT__MIN_SIZE_TEST=0, INPUT__FORMAT="BGR")
    inputs = wrap_mapper(ImageMapper(cfg, False), "error")(record)
    assert np.array_equal(inputs["image"].numpy().transpose(1, 2, 0), pixels)


@pytest.mark.parametrize("dtype, mode", [(np.uint16, "16-bit"), (np.int32, "32-bit"), (np.float32, "floating-point")])
def test_grey_of_other_depths_is_refused(dtype, mode, tmp_path):
    grey = np.asarray(noise().convert("L")).astype(dtype)
    (tmp_path / "a.tiff").write_bytes(encode(Image.fromarray(grey), "tiff"))
    record = {"file_name": str(tmp_path / "a.tiff"), "width": 40, "height": 30}
    with pytest.raises(DatasetError, match=f"a.tiff has {mode} pixels .* convert all images to 8 bits"):
        wrap_mapper(ImageMapper(config(), False), "error")(record)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), os.mkfifo])
def test_what_is_no_file_is_named(make, tmp_path):
    make(tmp_path / "a.png")
    record = {"file_name": str(tmp_path / "a.png"), "width": 40, "height": 30}
    with pytest.raises(DatasetError, match=r"a\.png cannot be read \(there is no such file\)"):
        wrap_mapper(ImageMapper(config(), True), "error")(record)


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (4000, 2), (2, 4000)])
def test_the_longest_images_keep_a_pixel(size):
    image = np.zeros((*size, 3), dtype=np.uint8)
    for augmentation in (
        T.ResizeShortestEdge(800, 1333),
        T.ResizeScale(min_scale=0.1, max_scale=0.1, target_height=64, target_width=64),
    ):
        assert min(augmentation.get_transform(image).apply_image(image).shape) >= 1


def test_other_sizes_are_resized_as_before():
    shapes = {(480, 640): (800, 1067), (640, 480): (1067, 800), (100, 500): (267, 1333), (3, 4000): (1, 1333)}
    assert {size: T.ResizeShortestEdge.get_output_shape(*size, 800, 1333) for size in shapes} == shapes


@pytest.mark.parametrize("split", ["train", "val"])
def test_with_loading_processes_there_is_one_error_line(split, tmp_path):
    write_case("control", tmp_path)
    for name in ("0001.png", "0101.png"):
        if (tmp_path / split / name).exists():  # found when it is read: its first and last bytes are sound
            (tmp_path / split / name).write_bytes(flipped((tmp_path / split / name).read_bytes()))
    cfg = config(RETINANET, MODEL__RETINANET__NUM_CLASSES=2, OUTPUT_DIR=str(tmp_path / "output"))
    cfg.DATASETS.REGISTER = [
        {"NAME": f"split_{s}", "JSON": str(tmp_path / f"{s}.json"), "IMAGES": str(tmp_path / s)}
        for s in ("train", "val")
    ]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("split_train",), ("split_val",)
    cfg.merge_from_list(["SOLVER.MAX_ITER", 3, "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 2])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    done = tool("train_net", "--config-file", tmp_path / "config.yaml", check=False)
    log = (tmp_path / "output" / "log.txt").read_text()
    for text in (done.stdout, log):
        assert "Traceback" not in text
        (line,) = [line for line in text.splitlines() if "ERROR" in line]
        assert f"/{split}/0" in line and "cannot be read" in line
    assert done.returncode == 2


# --- Label maps --------------------------------------------------------------------

LABELS = np.array([[0, 1, 2], [2, 255, 0]], dtype=np.uint8)


def palette(labels: np.ndarray) -> Image.Image:
    image = Image.fromarray(labels).convert("P")
    image.frombytes(labels.tobytes())
    return image


@pytest.mark.parametrize(
    "data",
    [
        encode(Image.fromarray(LABELS)),
        encode(palette(LABELS)),
        encode(Image.fromarray(LABELS.astype(np.uint16))),
        encode(Image.fromarray(LABELS.astype(np.int32)), "tiff"),
        encode(palette(LABELS), "bmp"),
    ],
    ids=["grey", "palette", "16 bit", "32 bit", "bmp"],
)
def test_label_maps_hold_classes(data, tmp_path):
    (tmp_path / "a.png").write_bytes(data)
    labels = read_label_map(str(tmp_path / "a.png"), np.int64, LabelRange(3, 255))
    assert labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    "data, words",
    [
        (encode(Image.fromarray(LABELS).convert("RGB")), "has colors or floats (mode RGB)"),
        (encode(Image.fromarray(LABELS).convert("LA")), "has colors or floats (mode LA)"),
        (encode(Image.fromarray(LABELS.astype(np.float32)), "tiff"), "has colors or floats (mode F)"),
        (encode(Image.fromarray(LABELS + np.uint8(2))), "has the label 3, and there are 3 classes"),
        (encode(Image.fromarray(LABELS.astype(np.int32) - 1), "tiff"), "has the label -1"),
        (encode(Image.fromarray(LABELS.astype(np.uint16) * 256)), "has the label 256"),
        (flipped(encode(noise().convert("L"))), "cannot be read"),
        (b"", "cannot be read (the file is empty)"),
    ],
    ids=["rgb", "la", "float", "class 3", "negative", "16 bit", "damaged", "empty"],
)
def test_label_maps_that_are_refused(data, words, tmp_path):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(LabelMapError, match="a.png") as error:
        read_label_map(str(tmp_path / "a.png"), np.int64, LabelRange(3, 255))
    assert words in str(error.value)


@pytest.mark.parametrize("listed", [True, False])
def test_a_label_map_must_have_the_size_of_its_image(listed, tmp_path):
    noise(40, 30).save(tmp_path / "a.png")
    Image.new("L", (30, 40)).save(tmp_path / "a_gt.png")
    record = {"file_name": str(tmp_path / "a.png"), "sem_seg_file_name": str(tmp_path / "a_gt.png")}
    record.update({"width": 40, "height": 30} if listed else {})
    for is_train in (True, False):
        with pytest.raises(DatasetError, match="a_gt.png is 30 x 40 .* its image is 40 x 30: .* swapped"):
            wrap_mapper(ImageMapper(config(), is_train), "error")(record)


def test_a_label_of_no_class_is_skipped_or_named_in_training(tmp_path):
    noise(3, 2).save(tmp_path / "a.png")
    Image.fromarray(LABELS + np.uint8(2)).save(tmp_path / "a_gt.png")
    record = {"file_name": str(tmp_path / "a.png"), "sem_seg_file_name": str(tmp_path / "a_gt.png")}
    cfg = config(MODEL__META_ARCHITECTURE="SemanticSegmentor", MODEL__SEM_SEG_HEAD__NUM_CLASSES=3)
    with pytest.raises(DatasetError, match="a_gt.png has the label 3, and there are 3 classes.*ON_BAD_IMAGE"):
        wrap_mapper(ImageMapper(cfg, is_train=True), "error")(record)
    assert wrap_mapper(ImageMapper(cfg, is_train=True), "skip")(record) is None


# --- Annotation files --------------------------------------------------------------


@pytest.fixture
def split(tmp_path):
    """A sound dataset in tmp_path, val.json and val, that a test may change and check by `check`."""
    found = sound_split("val")
    found.write(tmp_path)
    return found


def check(split, folder, **arguments):
    (folder / "val.json").write_text(json.dumps(split.content))
    return validate_coco_json(str(folder / "val.json"), str(folder / "val"), **arguments)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-le"])
def test_json_in_any_unicode_encoding(encoding, split, tmp_path):
    path = tmp_path / "val.json"
    path.write_bytes(json.dumps({**split.content, "info": "é"}, ensure_ascii=False).encode(encoding))
    assert validate_coco_json(str(path), str(tmp_path / "val")).num_images == 2
    name = f"encoded_{tmp_path.name}"
    assert len(load_coco(str(path), str(tmp_path / "val"), name)) == 2
    MetadataCatalog.get(name).json_file = str(path)
    evaluator = CocoEvaluator(name)
    evaluator.reset()
    assert evaluator.evaluate() == {}
    MetadataCatalog.pop(name)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "the file is empty"),
        (b"\x1f\x8b\x08" + bytes(20), "compressed"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<html></html>", "web page"),
        (b'{"info": "caf\xe9"}', "can't decode"),
        (b"[" * 100_000, "recursion"),
        (b'{"images": ' + b"9" * 5000, "digits"),
    ],
    ids=["empty", "gzip", "pointer", "web page", "latin-1", "deep", "long number"],
)
def test_files_that_are_no_json(content, words, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DatasetError, match="a.json is not JSON") as error:
        validate_coco_json(str(tmp_path / "a.json"))
    assert words in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda polygon: [v / SIZE for v in polygon], "polygons of 4 of 4 annotations lie wholly outside their box"),
        (lambda polygon: [polygon[i : i + 2] for i in range(0, len(polygon), 2)], "is a list of points"),
        (lambda polygon: dict(enumerate(polygon)), "has a dict where a polygon"),
        (lambda polygon: polygon[:-1], "has an odd number of coordinates"),
        (lambda polygon: polygon[:4], "has fewer than three points"),
        (lambda polygon: [*polygon, 1e300, 0], "far outside the image"),
        (lambda polygon: [*polygon, float("-inf"), 0], "not finite"),
        (lambda polygon: [str(v) for v in polygon], "has a str where a coordinate"),
    ],
)
def test_polygons_that_masks_cannot_be_made_of(change, words, split, tmp_path):
    for annotation in split.annotations:
        annotation["segmentation"] = [change(annotation["segmentation"][0])]
    with pytest.raises(DatasetError, match=r"first annotation \(id 1\) in 0100.png") as error:
        check(split, tmp_path, masks="polygon")
    assert words in str(error.value)
    assert check(split, tmp_path).num_objects == 4
    assert len(load_coco(str(tmp_path / "val.json"), str(tmp_path / "val"), "boxes_only")) == 2
    MetadataCatalog.pop("boxes_only")


def test_parts_of_masks_that_cannot_be_used_are_a_warning(split, tmp_path, caplog):
    split.annotations[1]["segmentation"].append([1, 2, 3])
    split.annotations[2]["segmentation"] = [[0, 0, 1, 0, 1, 1]]
    check(split, tmp_path, masks="polygon")
    assert "1 of 4 annotations have polygons with fewer than three points or an odd number" in caplog.text
    assert "first annotation (id 2) in 0100.png; they are used without these" in caplog.text
    assert "the polygons of 1 of 4 annotations lie wholly outside their box, first annotation (id 3)" in caplog.text


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda r: {**r, "counts": r["counts"][:-2]}, "end in the middle"),
        (lambda r: {**r, "counts": "hello world!"}, "no compressed RLE"),
        (lambda r: {**r, "counts": "é中"}, "no compressed RLE"),
        (lambda r: {**r, "counts": ""}, "has runs of 0 pixels"),
        (lambda r: {**r, "counts": [5000, -904]}, "no numbers of pixels"),
        (lambda r: {**r, "counts": [100, 100]}, "has runs of 200 pixels in all, and its image has 4096"),
        (lambda r: {**r, "counts": [4096.0]}, "no numbers of pixels"),
        (lambda r: {**r, "counts": None}, "no RLE"),
        (lambda r: {**r, "size": [SIZE, 1]}, "has the size [64, 1], and its image is [64, 64]"),
        (lambda r: {"counts": r["counts"]}, "no RLE"),
    ],
)
def test_runs_that_masks_cannot_be_made_of(change, words, split, tmp_path):
    for annotation in split.annotations:
        annotation["segmentation"] = change(runs_of(annotation))
    with pytest.raises(DatasetError, match=r"first annotation \(id 1\) in 0100.png"):
        check(split, tmp_path, masks="bitmask")
    with pytest.raises(ValueError) as error:
        usable_segmentation(split.annotations[0]["segmentation"], SIZE, SIZE)
    assert words in str(error.value)


def test_compressed_runs_of_any_mask_are_sound():
    random = np.random.default_rng(0)
    for height, width in ((1, 1), (1, 300), (64, 64), (300, 2)):
        for density in (0, 0.01, 0.5, 1):
            mask = np.asfortranarray(random.random((height, width)) < density, dtype=np.uint8)
            rle = mask_util.encode(mask)
            value = {"size": rle["size"], "counts": rle["counts"].decode()}
            assert usable_segmentation(value, height, width) is value


def test_objects_whose_boxes_are_all_empty(split, tmp_path):
    for annotation in split.annotations:
        annotation["bbox"][2:] = [0, 0]
    split.annotations[0]["iscrowd"] = 1
    (tmp_path / "val.json").write_text(json.dumps(split.content))
    cfg = config()
    name = f"empty_{tmp_path.name}"
    cfg.DATASETS.REGISTER = [{"NAME": name, "JSON": str(tmp_path / "val.json"), "IMAGES": str(tmp_path / "val")}]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    register_datasets(cfg)
    with pytest.raises(DatasetError, match=r"cannot be trained on: all 4 annotations have iscrowd 1 or an empty box"):
        check_datasets(cfg, ("TRAIN",))
    check_datasets(cfg, ("TEST",))
    cfg.TEST.BEST_CHECKPOINT.METRIC = "bbox/AP"
    with pytest.raises(DatasetError, match=r"METRIC is 'bbox/AP', which tells nothing .* iscrowd 1 or an empty box"):
        check_datasets(cfg, ("TEST",))


@pytest.mark.parametrize("sides", [[-20, 10], [10, -20], [-20, -10], [0, 10]])
def test_boxes_without_area_pass_the_evaluation_as_they_pass_the_check(sides, split, tmp_path):
    for annotation in split.annotations:
        del annotation["area"]
    split.annotations[0]["bbox"] = [30, 30, *sides]
    assert check(split, tmp_path, evaluated=True).num_objects == 3
    path, name = str(tmp_path / "val.json"), f"negative_{tmp_path.name}"
    load_coco(path, str(tmp_path / "val"), name)
    MetadataCatalog.get(name).json_file = path
    x, y, width, height = split.annotations[1]["bbox"]
    for truth in (CocoEvaluator(name)._coco_api, NumberedCOCO(read_coco(path))):
        assert [truth.anns[i]["area"] for i in (1, 2)] == [0, width * height]
    MetadataCatalog.pop(name)


def test_files_that_are_listed_twice_are_a_warning(split, tmp_path, caplog):
    split.images[1]["file_name"] = split.images[0]["file_name"]
    check(split, tmp_path)
    assert "2 images have only 1 files, 0100.png is listed 2 times" in caplog.text


@pytest.mark.parametrize("points", [[1, 2, 2, 3, 4, 2], [{"x": 1}], "1 2 2", [1, 2], [float("nan"), 1, 2]])
def test_key_points_matter_to_models_that_use_them_only(points, split, tmp_path):
    split.annotations[0]["keypoints"] = points
    check(split, tmp_path)
    records = load_coco(str(tmp_path / "val.json"), str(tmp_path / "val"), "points")
    assert ("keypoints" in records[0]["annotations"][0]) == (len(points) == 6)
    MetadataCatalog.pop("points")


@pytest.mark.parametrize("name", ["a\nb", "x" * 3000])
def test_messages_stay_on_one_line_whatever_classes_are_called(name, split, tmp_path):
    split.content["categories"][0]["name"] = name
    (tmp_path / "val.json").write_text(json.dumps(split.content))
    cfg = config()
    dataset = f"classes_{tmp_path.name}"
    cfg.DATASETS.REGISTER = [{"NAME": dataset, "JSON": str(tmp_path / "val.json"), "IMAGES": str(tmp_path / "val")}]
    cfg.DATASETS.TRAIN = (dataset,)
    register_datasets(cfg)
    with pytest.raises(DatasetError, match=r"2 classes \(.*MODEL.RETINANET.NUM_CLASSES is 3") as error:
        check_classes(cfg)
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


def test_proposals_are_clipped_to_the_image_as_the_model_sees_it(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        detection_utils,
        "transform_proposals",
        lambda record, shape, transforms, proposal_topk: seen.append((shape, proposal_topk)),
        raising=False,
    )
    Image.new("RGB", (40, 20)).save(tmp_path / "x.png")
    mapper = ImageMapper(config(INPUT__MIN_SIZE_TEST=60), False)
    mapper.proposal_topk = 7
    mapper({"file_name": str(tmp_path / "x.png"), "height": 20, "width": 40})
    assert seen == [((60, 120), 7)]
