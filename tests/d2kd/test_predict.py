"""`d2kd predict`: results are those of an evaluation, for every task; files, pictures, videos, and what goes wrong."""

import csv
import importlib.util
import json
import logging
import re
import runpy
import shlex
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from models import FASTER_RCNN
from PIL import Image
from runs import ROOT
from segmentors import PSP
from test_cli import program
from test_solo import SOLO

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.cli import predict
from d2kd.data.datasets import register_datasets
from d2kd.engine import DistillTrainer, load_config
from d2kd.engine.evaluation import evaluate_student
from d2kd.errors import UserError
from d2kd.export import export_model
from d2kd.modeling.checkpoint_files import write_checkpoint
from d2kd.prediction import Prediction, Predictor, find_inputs, predict_files, run
from d2kd.prediction.files import OutputError
from d2kd.prediction.inputs import InputError, Video, picture_name
from d2kd.prediction.panoptic import id_picture
from d2kd.prediction.predictor import read_output
from d2kd.visualization import panoptic_picture, prediction_picture
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

PLUGIN = str(Path(__file__).parent / "plugins/digit_labels.py")
DIGITS = [str(i) for i in range(10)]
KINDS: dict[str, dict[str, Any]] = {
    "boxes": {},
    "masks": {
        **SOLO,
        "MODEL.SOLO.NUM_CLASSES": 10,
        "MODEL.SOLO.SCORE_THRESH_TEST": -1.0,
        "MODEL.SOLO.FINAL_SCORE_THRESH_TEST": 0.0,
        "MODEL.SOLO.MASK_THRESH_TEST": 1e-5,
        "TEST.DETECTIONS_PER_IMAGE": 20,
    },
    "rcnn": {**FASTER_RCNN, "MODEL.ROI_HEADS.NUM_CLASSES": 10, "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0},
    "labels": {
        **PSP,
        "DISTILL.IMPORTS": [PLUGIN],
        "DATASETS.TRAIN": ["digit_labels_train"],
        "DATASETS.TEST": ["digit_labels_val"],
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 11,
    },
    "classes": {
        "MODEL.META_ARCHITECTURE": "ImageClassifier",
        "MODEL.BACKBONE.NAME": "build_timm_network",
        "MODEL.TIMM.NAME": "mobilenetv2_035",
        "MODEL.CLASSIFIER.NUM_CLASSES": 10,
        "INPUT.CLASSIFICATION.SIZE": 32,
        "DATASETS.TRAIN": ["crops_train"],
        "DATASETS.TEST": ["crops_val"],
    },
}


@pytest.fixture
def student(write_config, digits, tmp_path, monkeypatch, forget_datasets):
    """Writes YAML and checkpoint of an untrained student of a kind; returns both paths."""
    monkeypatch.setenv("D2KD_TEST_DIGITS", str(digits))

    def write(kind: str = "boxes", names: Any = None, **changes: Any) -> tuple[Path, Path]:
        keys = {**KINDS[kind], **changes}
        if kind == "classes":
            folders = digits / "classification"
            keys["DATASETS.REGISTER"] = [
                {"NAME": f"crops_{s}", "FORMAT": "folders", "IMAGES": str(folders / s)} for s in ("train", "val")
            ]
        path = write_config("student", **{key.replace(".", "__"): value for key, value in keys.items()})
        torch.manual_seed(3)
        weights = tmp_path / "student.pth"
        kept = {} if names is None else {"class_names": {"thing_classes": names}}
        write_checkpoint(weights, {"model": build_model(load_config(str(path))).state_dict(), **kept})
        return path, weights

    return write


def call(*arguments: Any) -> Any:
    """Runs the command in this process."""
    args = predict.argument_parser().parse_intermixed_args(list(map(str, arguments)))
    return predict.main(args)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def by_file(results: list[dict[str, Any]], files: dict[Any, str]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in results:
        kept = {k: v for k, v in entry.items() if k not in ("image_id", "file_name", "label", "names")}
        found.setdefault(Path(files[entry["image_id"]]).name, []).append(kept)
    return found


FILES = {
    "boxes": "coco_instances_results.json",
    "masks": "coco_instances_results.json",
    "rcnn": "coco_instances_results.json",
    "labels": "sem_seg_predictions.json",
    "classes": "classification_predictions.json",
}


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_those_of_an_evaluation(kind, student, tmp_path):
    path, weights = student(kind)
    cfg = load_config(str(path), ["MODEL.WEIGHTS", str(weights)])
    register_datasets(cfg)
    DistillTrainer.check_config(cfg, ("TEST",))
    evaluate_student(DistillTrainer, cfg, resume=False)
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])[:6]
    files = [record["file_name"] for record in records]
    call(*files, "--config-file", path, "--weights", weights, "--output", tmp_path / "out", "--threshold", 0)

    theirs = read(Path(cfg.OUTPUT_DIR, "inference", FILES[kind]))
    ours = read(tmp_path / "out" / FILES[kind])
    images = read(tmp_path / "out/images.json")
    if kind == "labels":  # which evaluators list by file
        theirs = [{**entry, "image_id": entry["file_name"]} for entry in theirs if entry["file_name"] in files]
        expected = by_file(theirs, {name: name for name in files})
    else:
        ids = {record["image_id"]: record["file_name"] for record in records}
        expected = by_file([entry for entry in theirs if entry["image_id"] in ids], ids)
    assert ours and by_file(ours, {i["id"]: i["file_name"] for i in images["images"]}) == expected

    assert [image["file_name"] for image in images["images"]] == files
    rows = list(csv.DictReader((tmp_path / "out/predictions.csv").open(encoding="utf-8", newline="")))
    names = {category["name"] for category in images["categories"]}
    assert rows and {row["class"] for row in rows} <= names
    if kind in ("boxes", "masks", "rcnn", "classes"):
        assert names == set(DIGITS) and len(rows) == (len(files) * 5 if kind == "classes" else len(ours))
    for record in records:  # every image has its picture, and is enlarged
        picture = cv2.imread(str(tmp_path / "out/pictures" / Path(record["file_name"]).name))
        assert picture is not None and max(picture.shape) >= 480
    if kind == "labels":
        stem = Path(files[0]).stem
        labels = cv2.imread(str(tmp_path / f"out/label_maps/{stem}.png"), cv2.IMREAD_UNCHANGED)
        counts = {row["class_id"]: int(row["pixels"]) for row in rows if row["file"] == files[0]}
        assert counts == {str(i): int(n) for i, n in zip(*np.unique(labels, return_counts=True))}


@pytest.mark.parametrize(
    ("kind", "ending"), [("boxes", ".pt"), ("masks", ".onnx"), ("labels", ".onnx"), ("classes", ".onnx")]
)
def test_an_exported_file_predicts_what_its_student_predicts(kind, ending, student, digits, tmp_path):
    if ending == ".onnx":
        pytest.importorskip("onnxruntime", reason="pip install 'd2kd[onnx]'")
    names = [f"digit {i}" for i in range(10)]
    path, weights = student(kind, names=names)
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for side, file in zip(((64, 80), (128, 96), (50, 90)), files):
        image = np.random.default_rng(side[0]).integers(0, 255, (8, 8, 3)).astype(np.uint8)
        cv2.imwrite(str(file), cv2.resize(image, side, interpolation=cv2.INTER_CUBIC))
    exported = tmp_path / f"student{ending}"
    export_format = "onnx" if ending == ".onnx" else "torchscript"
    cfg = load_config(str(path))
    model = build_model(cfg)
    model.load_state_dict(torch.load(weights, weights_only=True)["model"], strict=False)
    class_names = {"thing_classes": names}
    export_model(
        cfg, model, exported, export_format, class_names=class_names, class_ids={"thing_classes": range(3, 13)}
    )

    call(*files, "--config-file", path, "--weights", weights, "--output", tmp_path / "a", "--batch", 1)
    call(*files, "--weights", exported, "--output", tmp_path / "b", "--batch", 3)
    results = [read(tmp_path / folder / FILES[kind]) for folder in "ab"]
    if kind == "labels":
        labels = [cv2.imread(str(tmp_path / x / "label_maps/1.png"), cv2.IMREAD_UNCHANGED) for x in "ab"]
        assert labels[0].shape == (96, 128) and (labels[0] == labels[1]).mean() > 0.999
        return
    if kind == "classes":
        for theirs, ours in zip(*results):
            assert theirs["classes"] == ours["classes"] and theirs["names"] == ours["names"]
            np.testing.assert_allclose(theirs["scores"], ours["scores"], atol=1e-4)
        return
    theirs, ours = ([(r["image_id"], round(r["score"], 2)) for r in results[i]] for i in (0, 1))
    assert len(theirs) == len(ours) > 30 and sorted(theirs) == sorted(ours)
    assert {r["category_id"] for r in results[1]} <= set(range(3, 13))
    assert [c["name"] for c in read(tmp_path / "b/images.json")["categories"]] == names
    best = [max(result, key=lambda r: r["score"]) for result in results]
    np.testing.assert_allclose(best[0]["bbox"], best[1]["bbox"], atol=1.5 if kind == "masks" else 0.1)
    if kind == "masks":  # made in the size that the network sees, and resized
        assert mask_util.iou([best[0]["segmentation"]], [best[1]["segmentation"]], [0])[0, 0] > 0.95


def test_files_that_are_no_exports_are_one_line(student, tmp_path):
    weights = student()[1]
    image = tmp_path / "a.png"
    cv2.imwrite(str(image), np.zeros((32, 32, 3), np.uint8))
    (tmp_path / "broken.pt").write_bytes(b"PK no network")
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), tmp_path / "other.pt")
    (tmp_path / "broken.onnx").write_bytes(b"no network")
    cases = [
        (["--weights", tmp_path / "broken.pt"], "broken.pt cannot be read as torchscript: "),
        (["--weights", tmp_path / "other.pt"], "other.pt was not written by d2kd export"),
        (["--weights", tmp_path / "other.pt", "--config-file", "x.yaml"], "has its configuration inside"),
        (["--weights", tmp_path / "other.pt", "--device", "cuda"], "traced on the CPU and runs there only"),
        (["--weights", tmp_path / "none.onnx"], "there is no such file"),
    ]
    if importlib.util.find_spec("onnxruntime"):
        cases.append((["--weights", tmp_path / "broken.onnx"], "broken.onnx cannot be read as onnx: "))
        cases.append((["--weights", tmp_path / "broken.onnx", "--device", "cuda"], "has no CUDAExecutionProvider"))
    for arguments, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            call(image, *arguments, "--output", tmp_path / "out")
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    assert weights.exists()


@pytest.mark.parametrize("kind", ["rcnn", "labels"])
def test_results_with_test_time_augmentation_are_those_of_an_evaluation(kind, student, tmp_path):
    augmented = {"TEST.AUG.ENABLED": True, "TEST.AUG.MIN_SIZES": [48, 64], "TEST.AUG.MAX_SIZE": 96}
    path, weights = student(kind, **augmented)
    runpy.run_path(PLUGIN)  # an import registers its datasets once a process
    cfg = load_config(str(path), ["MODEL.WEIGHTS", str(weights)])
    register_datasets(cfg)
    DistillTrainer.check_config(cfg, ("TEST",))
    evaluate_student(DistillTrainer, cfg, resume=False)
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])[:2]
    names = {record.get("image_id", record["file_name"]): record["file_name"] for record in records}
    arguments = (*names.values(), "--config-file", path, "--weights", weights, "--no-pictures")
    call(*arguments, "--output", tmp_path / "out")
    call(*arguments, "--output", tmp_path / "plain", "--opts", "TEST.AUG.ENABLED", "False")

    files = {image["id"]: image["file_name"] for image in read(tmp_path / "out/images.json")["images"]}
    ours, plain = (by_file(read(tmp_path / folder / FILES[kind]), files) for folder in ("out", "plain"))
    theirs = read(Path(cfg.OUTPUT_DIR, "inference_TTA", FILES[kind]))
    if kind == "labels":
        theirs = [{**entry, "image_id": entry["file_name"]} for entry in theirs]
    assert ours == by_file([entry for entry in theirs if entry["image_id"] in names], names) != plain


def test_augmentation_that_an_architecture_lacks_is_an_error_before_weights_are_read(student, digits, tmp_path):
    path, weights = student()
    weights.write_bytes(b"")
    arguments = (digits / "val", "--config-file", path, "--weights", weights, "--output", tmp_path / "out")
    with pytest.raises(UserError, match="no test-time augmentation for MODEL.META_ARCHITECTURE RetinaNet"):
        call(*arguments, "--opts", "TEST.AUG.ENABLED", "True")
    assert not (tmp_path / "out").exists()


def test_names_come_from_the_checkpoint_then_the_data_then_numbers(student, digits, tmp_path, caplog):
    names = [f"Ziffer {i}" for i in range(9)] + ["neun, \u4e5d"]
    path, weights = student(names=names)
    images, _ = find_inputs([str(digits / "val")])
    cfg = load_config(str(path))

    def classes(**entries: Any) -> tuple[list[str], list[int]]:
        model = torch.load(weights, weights_only=True)["model"]
        write_checkpoint(weights, {"model": model, **entries})
        found = Predictor.from_config(cfg, weights).classes["thing_classes"]
        return list(found.names), list(found.ids)

    assert classes(class_names={"thing_classes": names}) == (names, list(range(1, 11)))
    predictor = Predictor.from_config(cfg, weights)
    predict_files(predictor, images[:1], [], tmp_path / "out", threshold=0)
    text = (tmp_path / "out/predictions.csv").read_text(encoding="utf-8")
    assert '"neun, \u4e5d"' in text and "neun, \u4e5d" in (tmp_path / "out/images.json").read_text(encoding="utf-8")

    data_ids = [category["id"] for category in read(digits / "annotations/instances_val.json")["categories"]]
    assert classes() == (DIGITS, data_ids) and "numbered" not in caplog.text
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    assert classes()[0] == DIGITS and sum("classes are numbered from 0" in m for m in caplog.messages) == 1


def test_files_can_be_read_by_pycocotools_and_low_scores_are_in_coco_results_only(student, digits, tmp_path):
    from pycocotools.coco import COCO

    path, weights = student()
    images, _ = find_inputs([str(digits / "val")])
    predictor = Predictor.from_config(load_config(str(path)), weights)
    found = predictor(images[0].path).detections
    threshold = sorted(d["score"] for d in found)[-3]
    predict_files(predictor, images, [], tmp_path / "out", threshold=threshold, pictures=False)
    coco = COCO(str(tmp_path / "out/images.json"))
    results = coco.loadRes(str(tmp_path / "out/coco_instances_results.json"))
    assert len(results.getAnnIds(imgIds=[1])) == len(found)
    rows = list(csv.DictReader((tmp_path / "out/predictions.csv").open(encoding="utf-8", newline="")))
    assert sum(row["file"] == images[0].path for row in rows) == 3
    assert not (tmp_path / "out/pictures").exists()


def test_a_broken_image_is_skipped_named_and_counted(student, digits, tmp_path, caplog):
    path, weights = student()
    folder = tmp_path / "photos"
    shutil.copytree(digits / "val", folder / "below")
    (folder / "a.jpg").write_text("no image")
    whole = next((folder / "below").glob("*.*")).read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    images, _ = find_inputs([str(folder)])
    predictor = Predictor.from_config(load_config(str(path)), weights)
    summary = predict_files(predictor, images, [], tmp_path / "out", batch_size=3)
    predict.tell(summary, "out")
    count = len(list((digits / "val").iterdir()))
    assert (summary.images, len(summary.skipped)) == (count, 2)
    assert "a.jpg cannot be read (its content is that of no known image format)" in caplog.text
    assert "cut.png cannot be read" in caplog.text and "2 images could not be read and were skipped" in caplog.text
    assert len(list((tmp_path / "out/pictures/below").iterdir())) == count
    assert len(read(tmp_path / "out/images.json")["images"]) == count


#: As Python shows a name of a file with a byte that is no UTF-8.
FOREIGN = "caf\udce9"


@pytest.mark.parametrize("kind", ["boxes", "labels", "classes"])
def test_a_file_name_that_is_not_utf8_is_written_as_what_stands_for_it(kind, student, digits, tmp_path):
    path, weights = student(kind)
    image = tmp_path / f"{FOREIGN}.png"
    shutil.copy(next((digits / "val").iterdir()), image)
    call(image, "--config-file", path, "--weights", weights, "--output", tmp_path / "out", "--threshold", 0)
    assert read(tmp_path / "out/images.json")["images"][0]["file_name"] == str(image)
    assert len(read(tmp_path / "out" / FILES[kind])) > 0
    table = (tmp_path / "out/predictions.csv").read_text(encoding="utf-8")
    assert "caf\\udce9.png," in table
    assert (tmp_path / "out/pictures" / image.name).is_file()


def test_opencv_is_given_no_path_that_ends_the_program(student, clip, tmp_path):
    path, weights = student()
    foreign = shutil.copy(clip, tmp_path / f"{FOREIGN}.avi")
    for given in (foreign, shutil.copy(clip, tmp_path / f"{FOREIGN}.unknown")):
        with pytest.raises(InputError, match=r"caf\\udce9\."):
            call(given, "--config-file", path, "--weights", weights, "--output", tmp_path / "out")
    with pytest.raises(InputError, match="has a name that is not UTF-8, which OpenCV cannot open: rename it"):
        Video(str(foreign), "").count()
    with pytest.raises(OutputError, match="is not UTF-8, and OpenCV cannot write it: name another folder"):
        call(clip, "--config-file", path, "--weights", weights, "--output", tmp_path / FOREIGN)


@pytest.fixture
def clip(digits, tmp_path):
    """A video of the images of the validation set, without losses."""
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"FFV1"), 12.0, (64, 64))
    for file in sorted((digits / "val").iterdir()):
        writer.write(cv2.imread(str(file)))
    writer.release()
    return path


def test_frames_of_a_video_and_of_a_camera_are_predicted_as_images(student, digits, clip, tmp_path, monkeypatch):
    path, weights = student()
    predictor = Predictor.from_config(load_config(str(path)), weights)
    frames = list(Video(str(clip), "clip.avi").frames())
    summary = call(
        clip, "--config-file", path, "--weights", weights, "--output", tmp_path / "out", "--threshold", 0, "--batch", 3
    )
    assert (summary.images, summary.frames) == (0, len(frames)) == (0, len(list((digits / "val").iterdir())))
    results = read(tmp_path / "out/coco_instances_results.json")
    second = [r for r in results if r["image_id"] == 2]
    image = tmp_path / "frame.png"
    cv2.imwrite(str(image), frames[1])
    for found in (predictor(frames[1]).detections, predictor(image).detections):
        assert len(found) == len(second)  # which came in a batch, and these alone
        for ours, theirs in zip(found, second):
            assert [*ours["bbox"], ours["score"]] == pytest.approx([*theirs["bbox"], theirs["score"]], abs=1e-4)
    made = cv2.VideoCapture(str(tmp_path / "out/pictures/clip.avi.mp4"))
    assert (made.get(cv2.CAP_PROP_FRAME_COUNT), made.get(cv2.CAP_PROP_FPS)) == (len(frames), 12)
    rows = list(csv.DictReader((tmp_path / "out/predictions.csv").open(encoding="utf-8", newline="")))
    assert {(row["file"], row["frame"]) for row in rows} == {(str(clip), str(i)) for i in range(len(frames))}

    opened = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda which: opened(str(clip) if which == 1 else which))
    arguments = ["--camera", 1, "--config-file", path, "--weights", weights, "--output", tmp_path / "seen"]
    assert call(*arguments, "--max-frames", 2).frames == 2
    assert [i["file_name"] for i in read(tmp_path / "seen/images.json")["images"]] == ["camera1"] * 2
    assert (tmp_path / "seen/pictures/camera1.mp4").is_file()


def test_what_cannot_be_predicted_on_is_one_line_and_leaves_nothing(student, clip, tmp_path, monkeypatch):
    path, weights = student()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:300])
    (tmp_path / "none.jpg").write_text("")
    image = tmp_path / "image.png"
    cv2.imwrite(str(image), np.zeros((64, 64, 3), np.uint8))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/kept.txt").write_text("kept")
    other = tmp_path / "other.pth"
    write_checkpoint(other, {"model": {"a.weight": torch.zeros(2)}})
    usual = ["--config-file", path, "--weights", weights]
    for words, message in [
        (["empty", *usual], "Folder empty holds no images (.jpg"),
        (["none/*.jpg", *usual], "Nothing matches none/*.jpg: no such file."),
        (["absent.jpg", *usual], "There is no absent.jpg: give an image, a folder, a glob or a video."),
        (["none.jpg", *usual], "Image none.jpg cannot be read (the file is empty)."),
        (["none.jpg", "notes.txt", *usual], "None of the 2 images can be read. The first one: Image none.jpg"),
        (["cut.mp4", *usual], "Video cut.mp4 "),
        ([image, "cut.mp4", *usual], "Video cut.mp4 "),
        (["--camera", 99, *usual], "Camera 99 (--camera) cannot be opened."),
        ([image, "--config-file", path, "--weights", other], "The student's checkpoint"),
        ([image, "--config-file", path, "--weights", "absent.pth"], "--weights is 'absent.pth': there is no such file"),
        ([image, "--config-file", path], "There are no weights to predict with"),
        ([image, "--weights", weights], "--config-file is missing"),
        ([*usual], "There is nothing to predict on"),
        ([image, *usual, "--batch", 0], "--batch is 0; it must be at least 1."),
        ([image, *usual, "--threshold", 2], "--threshold is 2.0; scores go from 0 to 1."),
        ([image, *usual, "--output", "full"], "--output full is not empty"),
        ([image, *usual, "--output", image], "is a file: name a folder."),
        ([image, *usual, "--output", f"{image}/below"], "cannot be written"),
    ]:
        with pytest.raises(UserError) as error:
            call(*words)
        assert message in str(error.value), words
        assert "\n" not in str(error.value) or "checkpoint" in message  # which lists what does not fit
        assert not (tmp_path / "predictions").exists(), words
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["kept.txt"]


def test_an_input_is_never_overwritten(student, digits, tmp_path):
    path, weights = student()
    shutil.copytree(digits / "val", tmp_path / "out/pictures")
    before = {p: p.read_bytes() for p in (tmp_path / "out/pictures").iterdir()}
    images, _ = find_inputs([str(tmp_path / "out/pictures")])
    predictor = Predictor.from_config(load_config(str(path)), weights)
    with pytest.raises(UserError, match="would take the place of an input"):
        predict_files(predictor, images, [], tmp_path / "out", overwrite=True)
    assert {p: p.read_bytes() for p in (tmp_path / "out/pictures").iterdir()} == before
    with pytest.raises(InputError, match="nothing to predict on"):  # what lies in the output is no input
        find_inputs([str(tmp_path / "out")], without=str(tmp_path / "out"))


@pytest.mark.parametrize("wrong", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_keeps_what_is_whole_and_an_error_leaves_no_results(
    wrong, student, digits, tmp_path, monkeypatch
):
    path, weights = student()
    images, _ = find_inputs([str(digits / "val")])
    predictor = Predictor.from_config(load_config(str(path)), weights)
    usual, calls = predictor.predict, []

    def stopping(inputs: Any) -> list[Prediction]:
        calls.append(inputs)
        if len(calls) > 2:
            raise wrong
        return usual(inputs)

    monkeypatch.setattr(predictor, "predict", stopping)
    if wrong is KeyboardInterrupt:
        summary = predict_files(predictor, images, [], tmp_path / "out")
        assert summary.interrupted and summary.images == 2
        assert len(read(tmp_path / "out/images.json")["images"]) == 2
    else:
        with pytest.raises(RuntimeError):
            predict_files(predictor, images, [], tmp_path / "out")
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["pictures"]
    assert len(list((tmp_path / "out/pictures").iterdir())) == 2
    assert not [p for p in (tmp_path / "out").rglob(".*")]


def test_inputs_are_found_once_in_order_and_have_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/2.PNG", "a/1.jpg", "a/b/1.jpg", "a/.hidden.jpg", "a/notes.txt", "1.jpg", "clip.MP4"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("")
    images, videos = find_inputs(["1.jpg", "a", "a/*.jpg", "clip.MP4"], camera=0)
    assert [(i.path, i.name) for i in images] == [
        ("1.jpg", "1.jpg"), ("a/1.jpg", "1_2.jpg"), ("a/2.PNG", "2.PNG"), ("a/b/1.jpg", "b/1.jpg"),
    ]  # fmt: skip
    assert videos == [Video(0, "camera0"), Video("clip.MP4", "clip.MP4")]


def test_what_is_left_out_of_a_folder_is_named(tmp_path, caplog):
    image = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    folder = tmp_path / "a"
    (folder / "out").mkdir(parents=True)
    image.save(folder / "1.jpg")
    image.save(folder / "still.gif")
    other = Image.fromarray(np.full((8, 8, 3), 200, np.uint8))
    image.save(folder / "moving.GIF", save_all=True, append_images=[other])
    for name in ("clip.mp4", "photo.HEIC", "b.avif", "notes.txt", "out/clip.mp4"):
        (folder / name).write_text("")
    with caplog.at_level("WARNING"):
        images, videos = find_inputs([str(folder)], without=str(folder / "out"))
    assert [image.name for image in images] == ["1.jpg", "still.gif"] and not videos
    assert "4 file(s) are left out (b.avif, clip.mp4, moving.GIF, ...), as of folders images are" in caplog.text
    for name in ("1.jpg", "still.gif"):
        (folder / name).unlink()
    with pytest.raises(InputError, match=r"holds no images .* Give others by name, or a pattern \(b\.avif, clip"):
        find_inputs([str(folder)], without=str(folder / "out"))


def test_a_gif_of_one_image_is_an_image(tmp_path):
    file = tmp_path / "still.gif"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file)
    images, videos = find_inputs([str(file)])
    assert [image.name for image in images] == ["still.gif"] and not videos
    assert picture_name(images[0].name, is_video=False) == "still.gif.png"


def test_links_in_circles_are_not_followed(tmp_path):
    folder = tmp_path / "a/b"
    folder.mkdir(parents=True)
    (folder / "1.jpg").write_text("")
    for name in "cdefg":  # with one way more at each of 40 levels, this would not end
        (folder / name).symlink_to(tmp_path / "a")
    images, _ = find_inputs([str(tmp_path / "a")])
    assert [image.name for image in images] == ["b/1.jpg"]


def test_no_two_inputs_share_a_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    for name in ("a/x.bmp", "a/x.bmp.png", "a/x.jpg", "x.bmp"):
        Path(name).write_text("")
    images, _ = find_inputs(["a", "x.bmp"])
    names = {image.path: picture_name(image.name, is_video=False) for image in images}
    assert names == {
        "a/x.bmp": "x.bmp.png", "a/x.bmp.png": "x.bmp_2.png", "a/x.jpg": "x.jpg", "x.bmp": "x_2.bmp.png",
    }  # fmt: skip


def test_pictures_show_what_is_given():
    image = np.full((100, 200, 3), 90, np.uint8)
    names = {"thing_classes": ["cat", "\u732b"], "stuff_classes": ["ground", "sky"]}
    box = {"bbox": [20.0, 30.0, 100.0, 40.0], "category_id": 1, "score": 0.9}
    low = {"bbox": [150.0, 80.0, 30.0, 10.0], "category_id": 0, "score": 0.1}
    enlarged = prediction_picture(image, names)
    assert enlarged.shape == (300, 600, 3) and (enlarged == 90).all()
    drawn = prediction_picture(image, names, detections=[low, box], threshold=0.5)
    changed = np.argwhere((drawn != 90).any(2))
    top, left = changed.min(0)
    bottom, right = changed.max(0)
    # scaled by 3, with a line around it, and the name above its upper edge
    assert abs(left - 60) <= 3 and abs(right - 360) <= 3 and abs(bottom - 210) <= 3 and 60 <= top <= 90
    labels = np.zeros((100, 200), np.int64)
    labels[:50] = 1
    mapped = prediction_picture(image, names, labels=labels)
    assert mapped.shape[0] > 300 and mapped.shape[1] == 600 and (mapped[100] == mapped[100, 0]).all()
    assert (mapped[100, 0] != mapped[200, 0]).any()
    one = prediction_picture(image, names, labels=labels * 0)
    assert one.shape == prediction_picture(image, names, labels=labels, whole_legend=True).shape
    best = prediction_picture(image, names, classes=[(0, 0.75), (1, 0.25)])
    strip = best[300:]
    assert (strip[3, :440] != 255).any(1).all() and (strip[3, 460:] == 255).all()  # a bar of 75 %


def test_progress_has_lines_where_there_is_no_terminal(monkeypatch, caplog):
    monkeypatch.setattr(run, "_EVERY", -1.0)
    monkeypatch.setattr(logging.getLogger("d2kd"), "propagate", True)
    with caplog.at_level(logging.INFO), run.Progress(3, "image") as progress:
        progress.bar.disable = True
        progress.add(2)
    assert "2 of 3 images" in caplog.text


def test_the_command_ends_in_one_line_with_status_2(tmp_path):
    run_ = program("predict", "absent.jpg", "--weights", "absent.pth", cwd=tmp_path)
    assert run_.returncode == 2 and "--config-file is missing" in run_.stderr + run_.stdout
    assert "Traceback" not in run_.stderr


def test_the_examples_of_the_documentation_run_as_printed(student, digits, clip, tmp_path, monkeypatch, capsys):
    path, weights = student(**{"MODEL.RETINANET.SCORE_THRESH_TEST": 0.0})
    monkeypatch.chdir(tmp_path)
    shutil.copytree(digits / "val", "photographs/below")
    shutil.copy(next((digits / "val").glob("*.png")), "photographs/1.png")
    Path("output/distilled").mkdir(parents=True)
    shutil.copy(weights, "output/distilled/model_final.pth")
    shutil.copy(path, "output/distilled/config.yaml")
    text = (ROOT / "docs/use.md").read_text(encoding="utf-8")
    commands = [
        shlex.split(c.replace("\\\n", "")) for c in re.findall(r"```bash\n(d2kd predict.*?)```", text, re.DOTALL)
    ]
    assert len(commands) == 2
    for words in commands:
        assert call(*words[2:]).images == len(list((digits / "val").iterdir())) + 1
    assert Path("predictions/pictures/below").is_dir() and Path("found/pictures/clip.avi.mp4").is_file()
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    assert capsys.readouterr().out.splitlines()[-1].startswith(tuple(DIGITS))
    flags = set(re.findall(r"--[a-z-]+", predict.argument_parser().format_help())) - {"--help"}
    assert flags <= set(re.findall(r"--[a-z-]+", text))


PANOPTIC = {
    "MODEL.META_ARCHITECTURE": "PanopticFPN",
    "MODEL.MASK_ON": True,
    "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 4,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 3,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 8,
    "MODEL.SEM_SEG_HEAD.NORM": "",
    "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH": 0.0,
    "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT": 1,
}


def test_merged_maps_are_written_in_the_panoptic_format_of_coco(student, digits, clip, tmp_path):
    path, weights = student("rcnn", **PANOPTIC)
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    files = sorted((digits / "val").glob("*.png"))[:2]
    for file in files:
        shutil.copy(file, photographs / file.name)
    cv2.imwrite(str(photographs / f"{files[0].stem}.jpg"), cv2.imread(str(files[0])))  # the same stem
    out = tmp_path / "out"
    call(photographs, clip, "--config-file", path, "--weights", weights, "--output", out, "--max-frames", 1)

    content = read(out / "panoptic.json")
    assert [c["name"] for c in content["categories"]] == [*DIGITS, "0", "1", "2"]
    assert [c["isthing"] for c in content["categories"]] == [1] * 10 + [0] * 3
    numbers = [c["id"] for c in content["categories"]]
    assert len(set(numbers)) == 13, "things and stuff have no id in common"
    assert len(content["images"]) == len(content["annotations"]) == 3, "frames of videos have no map"
    assert len({a["file_name"] for a in content["annotations"]}) == 3
    predictor = Predictor.from_config(load_config(str(path)), weights)
    kinds = set()
    for image, entry in zip(content["images"], content["annotations"]):
        assert entry["image_id"] == image["id"]
        found = predictor(image["file_name"]).panoptic
        blue, green, red = np.moveaxis(cv2.imread(str(out / "panoptic" / entry["file_name"])).astype(int), 2, 0)
        ids = red + 256 * green + 256**2 * blue
        assert (ids == found.ids).all() and ids.shape == (image["height"], image["width"])
        segments = {s["id"]: s for s in entry["segments_info"]}
        assert segments.keys() == set(ids.ravel().tolist()) - {0}
        for mine in found.segments:
            segment, inside = segments[mine["id"]], ids == mine["id"]
            assert segment["area"] == inside.sum()
            x, y, w, h = segment["bbox"]
            assert inside[y : y + h, x : x + w].sum() == inside.sum() and inside[y].any() and inside[y + h - 1].any()
            assert inside[:, x].any() and inside[:, x + w - 1].any()
            kinds.add(mine["isthing"])
            assert numbers.index(segment["category_id"]) == mine["category_id"] + (0 if mine["isthing"] else 10)
    assert kinds == {True, False}


def test_segments_have_the_color_of_their_class_and_things_an_outline():
    ids = np.zeros((480, 480), np.int32)
    ids[:240], ids[300:400, 100:200], ids[300:400, 200:300] = 70000, 2, 3
    segments = [
        {"id": 70000, "isthing": False, "category_id": 1},
        {"id": 2, "isthing": True, "category_id": 0, "score": 0.9},
        {"id": 3, "isthing": True, "category_id": 0, "score": 0.8},
    ]
    image = np.full((480, 480, 3), 100, np.uint8)
    names = {"thing_classes": ["cat"], "stuff_classes": ["things", "sky"]}
    drawn = panoptic_picture(image, ids, segments, names, colors=[(0, 0, 0), (200, 0, 0)])
    assert drawn.shape[0] > 480, "sky is named below"
    assert drawn[100, 50].tolist() == [40, 40, 160]  # 0.4 gray + 0.6 red
    assert drawn[450, 400].tolist() == [100, 100, 100], "pixels of no segment stay"
    assert (drawn[320, 110] == drawn[320, 290]).all() and (drawn[320, 110] != 100).any(), "two of a class"
    assert drawn[350, 198:203].max(axis=1).max() > 230, "an outline between them"
    assert (id_picture(ids)[0, 0] == [1, 17, 112]).all()  # 70000 = 112 + 256 * 17 + 65536
    things_only = panoptic_picture(image, ids * (ids < 10), segments[1:], {"thing_classes": ["cat"]})
    assert things_only.shape == image.shape


def test_a_merged_map_without_a_list_of_segments_is_left_out():
    seg = torch.zeros(4, 5, dtype=torch.int64)
    output = {"sem_seg": torch.zeros(2, 4, 5), "panoptic_seg": (seg, None)}
    assert read_output(output).panoptic is None and read_output({"sem_seg": torch.zeros(2, 4, 5)}).panoptic is None


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((8, 9), np.uint8), r"uint8 \(8, 9\)"),
        (np.zeros((8, 9, 4), np.uint8), r"uint8 \(8, 9, 4\)"),  # BGRA
        (np.zeros((3, 8, 9), np.uint8), r"uint8 \(3, 8, 9\)"),
        (np.zeros((8, 9, 3), np.float32), "float32"),
        (np.zeros((0, 9, 3), np.uint8), r"\(0, 9, 3\)"),
        ([[0]], "type list"),
        (None, "type NoneType"),
        (torch.zeros(3, 8, 9), "type Tensor"),
    ],
)
def test_arrays_that_are_no_image_in_bgr_are_told(image, words):
    predictor = Predictor(torch.nn.Identity(), lambda record: record, {})
    with pytest.raises(UserError, match=rf"The image is .*{words}.*must be .*BGR"):
        predictor(image)
