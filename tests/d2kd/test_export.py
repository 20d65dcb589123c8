"""`d2kd export --format`: files that give what the model gives on images of other sizes, or are not there."""

import importlib.util
import json

import pytest
import torch
from models import FASTER_RCNN, config, model
from runs import tool

from d2kd.export import Exported, ExportError, export_model, export_plain, exported, register_export
from d2kd.export.base import EXPORTS
from d2kd.export.dense_detector import RetinaNetExport, top_candidates
from d2kd.export.exporting import in_half
from d2kd.export.runner import open_file
from d2kd.export.verification import TOLERANCES, _compare_detections, run_file
from detectron2.config import get_cfg
from detectron2.modeling import build_model

has_onnx = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))
FORMATS = [
    "torchscript",
    pytest.param("onnx", marks=pytest.mark.skipif(not has_onnx, reason="pip install 'd2kd[onnx]'")),
]
SUFFIX = {"torchscript": ".pt", "onnx": ".onnx"}
SMALL = {"INPUT__MIN_SIZE_TEST": 64, "INPUT__MAX_SIZE_TEST": 120}
FCOS = {"MODEL__META_ARCHITECTURE": "FCOS", "MODEL__FCOS__NUM_CLASSES": 3, "MODEL__FCOS__NUM_CONVS": 1}
CLASSIFIER = {
    "MODEL.META_ARCHITECTURE": "ImageClassifier",
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res5"],
    "MODEL.CLASSIFIER.NUM_CLASSES": 3,
}
PIXELS = {
    "MODEL.META_ARCHITECTURE": "SemanticSegmentor",
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.OUT_CHANNELS": 8,
    "MODEL.SEM_SEG_HEAD.NAME": "SemSegFPNHead",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 3,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
}
NAMES = {"thing_classes": ["a", "b", "c"]}


def detector(name="RetinaNet", threshold=0.05):
    extra = {**FCOS, "MODEL__FCOS__NORM": "BN", "MODEL__FCOS__SCORE_THRESH_TEST": threshold} if name == "FCOS" else {}
    return config(**SMALL, **extra, MODEL__RETINANET__SCORE_THRESH_TEST=threshold)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("name", ["RetinaNet", "FCOS"])
def test_a_detector_is_exported_right_on_other_sizes(name, file_format, tmp_path):
    cfg, target = detector(name), tmp_path / f"x{SUFFIX[file_format]}"
    net = model(cfg)
    found = export_model(cfg, net, target, file_format, class_names=NAMES)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    assert len(set(found.sizes)) == 5 and len(found.sizes) == 6 and found.scores <= 1e-4
    about = open_file(str(target))[0]
    assert about["class_names"] == NAMES and about["outputs"] == ["boxes", "scores", "classes", "image"]
    assert about["input"]["channels"] == "BGR" and about["input"]["resize"]["shortest"] == 64 and about["d2kd"]


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("base", [CLASSIFIER, PIXELS], ids=["classifier", "segmentor"])
def test_classifiers_and_segmentors_are_exported_right_on_other_sizes(base, file_format, tmp_path):
    cfg = config(base, **SMALL, INPUT__CLASSIFICATION__SIZE=64)
    found = export_model(cfg, model(cfg), tmp_path / f"x{SUFFIX[file_format]}", file_format)
    assert len(set(found.sizes)) == 5 and found.compared > 3 and found.scores <= 1e-4


def test_detections_that_a_threshold_hides_are_compared_in_a_copy(tmp_path, caplog):
    cfg = detector(threshold=0.9)
    net = model(cfg)
    with caplog.at_level("INFO"):
        found = export_model(cfg, net, tmp_path / "x.pt", "torchscript")
    assert found.compared == 0 and net.test_score_thresh == 0.9
    copies = [record.getMessage() for record in caplog.records if record.getMessage().startswith("The copy")]
    assert len(copies) == 1 and "no detections" not in copies[0]


@pytest.mark.parametrize("file_format", FORMATS)
def test_an_image_of_a_batch_is_found_alone_as_in_the_batch(file_format, tmp_path):
    cfg, target = detector(threshold=0.0102), tmp_path / f"x{SUFFIX[file_format]}"
    cfg.TEST.DETECTIONS_PER_IMAGE = 7
    export_model(cfg, model(cfg), target, file_format)
    images = torch.rand(3, 3, 70, 101, generator=torch.Generator().manual_seed(1)) * 255
    together, *alone = run_file(target, [images, *images.split(1)], ("boxes", "scores", "classes", "image"))[0]
    assert together[3].tolist() == sorted(together[3].tolist())
    for number, one in enumerate(alone):
        rows = together[3] == number
        assert 0 < len(one[1]) == int(rows.sum()) <= 7
        torch.testing.assert_close(together[1][rows], one[1], atol=1e-5, rtol=0)


def test_half_precision_keeps_images_and_boxes_in_float32(tmp_path):
    kept = in_half(model(detector()))
    assert {x.dtype for x in kept.anchor_generator.buffers()} == {kept.pixel_mean.dtype} == {torch.float32}
    cfg = config(CLASSIFIER, **SMALL, INPUT__CLASSIFICATION__SIZE=64)
    found = export_model(cfg, model(cfg), tmp_path / "x.pt", "torchscript", precision="fp16")
    assert 0 < found.scores <= TOLERANCES["fp16"].scores
    half = torch.jit.load(str(tmp_path / "x.pt"))
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert half(torch.rand(1, 3, 64, 64) * 255).dtype == torch.float32


class OnOneSizeOnly(RetinaNetExport):
    """What a trace without care is: its padding is that of the image that it was made with."""

    def normalized(self, images):
        padded = super().normalized(images)
        return torch.nn.functional.interpolate(padded, size=(64, 64))


def test_a_file_that_is_wrong_on_another_size_is_an_error_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(EXPORTS, "RetinaNet", OnOneSizeOnly)
    cfg, target = detector(), tmp_path / "x.pt"
    target.write_text("an earlier export")
    with pytest.raises(ExportError, match="agree.*No file is kept"):
        export_model(cfg, model(cfg), target, "torchscript")
    assert target.read_text() == "an earlier export" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("wrong", ["score", "box", "class", "missing"])
def test_a_detection_that_differs_is_found(wrong):
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 20, 20]])
    ours = [boxes.clone(), torch.tensor([0.9, 0.5]), torch.tensor([1, 2]), torch.tensor([0, 0])]
    theirs = [x.clone() for x in ours]
    assert _compare_detections(theirs, ours, TOLERANCES["fp32"], "x") == (2, 0.0, 0.0)
    if wrong == "missing":
        ours = [x[:1] for x in ours]
    else:
        place, change = {"score": (1, 2e-4), "box": (0, 0.1), "class": (2, 1)}[wrong]
        ours[place][1] += change
    with pytest.raises(ExportError, match="1 agree"):
        _compare_detections(theirs, ours, TOLERANCES["fp32"], "x")


def test_rows_with_few_candidates_are_filled_up_with_what_no_threshold_admits():
    scores = torch.tensor([[0.2, 0.7, 0.1]])
    best, index = top_candidates(scores, 5)
    assert index.tolist() == [[1, 0, 2, 0, 0]] and best[0, 3:].tolist() == [-2, -2]
    assert top_candidates(scores, 2)[1].tolist() == [[1, 0]]


def test_an_architecture_without_export_is_told():
    with pytest.raises(ExportError, match="GeneralizedRCNN has no export.*RetinaNet.*--format torch"):
        exported(model(config(FASTER_RCNN)))


def test_an_export_of_ones_own_is_registered_once():
    with pytest.raises(ValueError, match="RetinaNet is registered already"):
        register_export("RetinaNet")(Exported)


def test_torch_writes_what_plain_detectron2_loads(tmp_path):
    cfg = config(FASTER_RCNN)
    files = export_plain(cfg, model(cfg), tmp_path / "student.pth", NAMES)
    assert [file.name for file in files] == ["student.pth", "student.yaml", "student.txt"]
    assert files[2].read_text().split() == NAMES["thing_classes"]
    plain = get_cfg()
    plain.merge_from_file(str(files[1]))
    assert "DISTILL" not in files[1].read_text() and plain.MODEL.WEIGHTS == "student.pth"
    plain.MODEL.DEVICE = "cpu"
    build_model(plain).load_state_dict(torch.load(files[0], weights_only=True)["model"], strict=False)


def test_torch_refuses_what_plain_detectron2_does_not_have(tmp_path):
    cfg = detector("FCOS")
    with pytest.raises(ExportError, match="META_ARCHITECTURE is FCOS, which plain Detectron2 does not have"):
        export_plain(cfg, model(cfg), tmp_path / "student.pth")
    assert not list(tmp_path.iterdir())


def test_the_command_exports_and_tells_what_is_wrong_in_one_line(tmp_path):
    cfg = detector()
    weights, yaml = tmp_path / "model.pth", tmp_path / "student.yaml"
    torch.save({"model": model(cfg).state_dict(), "class_names": NAMES}, weights)
    yaml.write_text(cfg.dump())
    target = tmp_path / "x.pt"
    done = tool("export_student", weights, target, "--format", "torchscript", "--config-file", yaml)
    assert "Verified in a process without d2kd" in done.stdout
    files = {"d2kd.json": ""}
    torch.jit.load(str(target), _extra_files=files)
    assert json.loads(files["d2kd.json"])["class_names"] == NAMES

    for words, message in (
        ((target, "--format", "torchscript"), "--format needs --config-file"),
        ((tmp_path / "x.onnx", "--format", "torchscript", "--config-file", yaml), "ends in .pt or .ts"),
        ((yaml / "x.pt", "--format", "torchscript", "--config-file", yaml), "cannot be written"),
    ):
        done = tool("export_student", weights, *words, check=False)
        assert done.returncode == 2 and message in done.stdout and "Traceback" not in done.stdout


def test_missing_packages_are_told_with_what_installs_them(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"needs onnx, onnxruntime, onnxscript.*pip install 'd2kd\[onnx\]'"):
        export_model(config(), None, tmp_path / "x.onnx", "onnx")
