"""`d2kd export --format`: files that give what the model gives on images of other sizes, or are not there."""

import importlib.util
import json

import pytest
import torch
from models import FASTER_RCNN, config, model
from runs import tool
from segmentors import PSP
from test_gfl import GFL
from test_reppoints import REPPOINTS
from test_solo import DECOUPLED, SOLO
from torch import nn
from torchvision.ops import deform_conv2d

from d2kd import cli
from d2kd.export import Exported, ExportError, export_model, export_plain, exported, register_export
from d2kd.export.base import EXPORTS
from d2kd.export.dense_detector import RetinaNetExport, top_candidates
from d2kd.export.exporting import in_half
from d2kd.export.layers import averaged, deformed
from d2kd.export.masks import pasted
from d2kd.export.rcnn import moved_boxes
from d2kd.export.runner import open_file
from d2kd.export.solo import decay
from d2kd.export.suppression import NOTHING, best_of_images
from d2kd.export.verification import TOLERANCES, _compare_detections, run_file
from d2kd.modeling.meta_arch.solo.matrix_nms import duplicate_overlaps, mask_overlaps, matrix_decay
from d2kd.prediction.exported_file import ExportedModel
from detectron2.config import get_cfg
from detectron2.layers import DeformConv, ModulatedDeformConv, paste_masks_in_image
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform

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
MASKS = {
    "MODEL.MASK_ON": True,
    "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 7,
}
MASK_RCNN = {**FASTER_RCNN, **MASKS}
CASCADE = {
    **MASK_RCNN,
    "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": True,
}
C4 = {
    **MASK_RCNN,
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res4"],
    "MODEL.RPN.IN_FEATURES": ["res4"],
    "MODEL.ROI_HEADS.IN_FEATURES": ["res4"],
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeads",
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16, 32, 64]],
    "MODEL.ROI_BOX_HEAD.NAME": "",
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 6,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 0,
}
OTHERS = {
    "Mask R-CNN": MASK_RCNN,
    "Cascade R-CNN": CASCADE,
    "R-CNN of C4": C4,
    "GFL": GFL,
    "RepPoints": REPPOINTS,
    "SOLO": SOLO,
    "decoupled SOLO": {**DECOUPLED, "MODEL.SOLO.NMS": "linear"},
    "PSPNet": PSP,
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


@pytest.mark.parametrize("align_corners", [False, True])
def test_an_exported_segmentor_gives_maps_of_another_size_as_the_model_does(align_corners, tmp_path):
    cfg = config(PSP, **SMALL, MODEL__SEM_SEG_HEAD__ALIGN_CORNERS=align_corners)
    net, target = model(cfg).eval(), tmp_path / "x.ts"
    export_model(cfg, net, target, "torchscript")
    image = torch.randint(256, (3, 64, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    inputs = [{"image": image, "height": 150, "width": 230}]
    with torch.no_grad():
        ours, theirs = net(inputs)[0]["sem_seg"], ExportedModel(target)(inputs)[0]["sem_seg"]
    assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-5)
    other = torch.nn.functional.interpolate(net([{"image": image}])[0]["sem_seg"][None], (150, 230), mode="bilinear")
    assert torch.allclose(ours, other[0], atol=1e-5) == (not align_corners)


def sure(net):
    """Spreads the predictions of random weights, which are all about the same."""
    names = ("cls_score", "bbox_pred", "objectness_logits", "anchor_deltas", "mask_pred", "mask_head.predictor")
    for name, parameter in net.named_parameters():
        if any(part in name for part in (*names, "initial_points", "refined_points")) and name.endswith("weight"):
            parameter.data *= 20 if "points" not in name else 5
        if "mask_pred" in name and name.endswith("bias"):
            parameter.data.zero_()
    return net


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_are_exported_right_on_other_sizes(name, file_format, tmp_path):
    cfg, target = config(OTHERS[name], **SMALL), tmp_path / f"x{SUFFIX[file_format]}"
    net = sure(model(cfg))
    found = export_model(cfg, net, target, file_format)
    assert len(set(found.sizes)) == 5 and found.scores <= 1e-4
    if name == "PSPNet":
        return
    outputs = open_file(str(target))[0]["outputs"]
    assert ("masks" in outputs) == bool(cfg.MODEL.MASK_ON)
    # in none of these images there is anything, and still all outputs are there
    nothing = run_file(target, [torch.zeros(2, 3, 50, 70)], outputs)[0][0]
    assert nothing[0].shape[1:] == (4,) and (len(outputs) < 5 or nothing[4].shape[1:] == (50, 70))


def test_boxes_that_leave_the_image_suppress_each_other_as_in_the_model():
    """Which of two suppresses the other depends on whether boxes are clipped before."""
    cfg = config(REPPOINTS, **SMALL, MODEL__REPPOINTS__SCORE_THRESH_TEST=0.0)
    net = sure(model(cfg)).eval()
    net.point_transform.log_scale.data += 2
    images = torch.rand(2, 3, 60, 90, generator=torch.Generator().manual_seed(0)) * 255
    with torch.no_grad():
        found, expected = exported(net)(images), exported(net).eager(images)
    assert (expected[0][:, 0] == 0).float().mean() > 0.1 and len(expected[0]) == len(found[0]) > 50
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("file_format", FORMATS)
def test_images_without_a_proposal_have_no_detections(file_format, tmp_path):
    cfg = config(CASCADE, **SMALL, MODEL__PROPOSAL_GENERATOR__MIN_SIZE=10_000)
    target = tmp_path / f"x{SUFFIX[file_format]}"
    assert export_model(cfg, model(cfg), target, file_format).compared == 0
    outputs = open_file(str(target))[0]["outputs"]
    shapes = [tuple(x.shape) for x in run_file(target, [torch.rand(2, 3, 40, 50)], outputs)[0][0]]
    assert shapes == [(0, 4), (0,), (0,), (0,), (0, 40, 50)]


def test_boxes_are_moved_as_detectron2_moves_them():
    transform, random = Box2BoxTransform((10.0, 10.0, 5.0, 5.0)), torch.Generator().manual_seed(0)
    boxes = torch.rand(5, 4, generator=random) * 50
    boxes[:, 2:] += boxes[:, :2]
    deltas = torch.randn(5, 12, generator=random) * 10
    found = moved_boxes(transform, deltas.reshape(5, 3, 4), boxes[:, None])
    torch.testing.assert_close(found.reshape(5, 12), transform.apply_deltas(deltas, boxes))


def test_graphs_of_layers_are_what_the_layers_are():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 7, 10)
    for size in (1, 2, 3, 6, (2, 5), (None, 3)):
        torch.testing.assert_close(averaged(x, size), nn.functional.adaptive_avg_pool2d(x, size), atol=1e-5, rtol=1e-5)
    for options in ({}, {"stride": 2, "dilation": 2}, {"groups": 2, "deformable_groups": 4}):
        for kind in (DeformConv, ModulatedDeformConv):
            layer = kind(8, 4, kernel_size=3, padding=1, **options)
            side = (3, 4) if "stride" in options else (7, 10)
            offset = 3 * torch.randn(2, 18 * layer.deformable_groups, *side)
            mask = torch.rand(2, 9 * layer.deformable_groups, *side) if kind is ModulatedDeformConv else None
            places = (layer.stride, layer.padding, layer.dilation)
            expected = deform_conv2d(x, offset, layer.weight, getattr(layer, "bias", None), *places, mask)
            torch.testing.assert_close(deformed(layer, x, offset, mask), expected, atol=1e-4, rtol=1e-4)


def test_masks_are_pasted_as_detectron2_pastes_them():
    torch.manual_seed(0)
    masks = torch.rand(6, 7, 7)
    corner = torch.rand(6, 2) * 60 - 10
    boxes = torch.cat([corner, corner + 1 + 40 * torch.rand(6, 2)], dim=1)
    expected = paste_masks_in_image(masks, boxes, (53, 71), threshold=0.5)
    found = pasted(masks, boxes, torch.zeros(1, 3, 53, 71), 0.5)
    assert expected.any() and (found != expected).float().mean() < 1e-4
    assert pasted(masks[:0], boxes[:0], torch.zeros(1, 3, 53, 71), 0.5).shape == (0, 53, 71)


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
def test_matrix_nms_of_a_batch_is_that_of_its_images(kernel):
    random = torch.Generator().manual_seed(0)
    inside = (torch.rand(9, 4, 5, generator=random) > 0.3).float()
    inside[1] = inside[0]
    image, classes = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1]), torch.tensor([1, 1, 2, 1, 1, 1, 1, 2, 2])
    found = decay(inside, image, classes, kernel, 2.0)
    for number in (0, 1):
        mine = image == number
        duplicates = duplicate_overlaps(mask_overlaps(inside[mine].bool()), classes[mine])
        torch.testing.assert_close(found[mine], matrix_decay(duplicates, kernel))
    assert decay(inside[:0], image[:0], classes[:0], kernel, 2.0).shape == (0,)


def test_the_best_of_each_image_stand_by_image():
    images, scores = torch.tensor([1, 0, 1, 0, 1]), torch.tensor([0.1, 0.5, 0.9, 0.7, 0.3])
    assert best_of_images(images, scores, 3, 2).tolist() == [3, 1, 2, 4]
    assert best_of_images(images[:0], scores[:0], 3, 2).tolist() == []


def test_parts_without_export_are_told(tmp_path):
    for changes, words in (
        (
            {"MODEL__PROPOSAL_GENERATOR__NAME": "PrecomputedProposals"},
            "PROPOSAL_GENERATOR.NAME is PrecomputedProposals",
        ),
        ({"MODEL__META_ARCHITECTURE": "ProposalNetwork"}, "ProposalNetwork has no export.*GeneralizedRCNN, "),
    ):
        with pytest.raises(ExportError, match=words):
            exported(model(config(FASTER_RCNN, **changes)))
    with pytest.raises(ExportError, match="MODEL.SOLO.NMS is mask, which has no export: set it to gaussian"):
        exported(model(config(SOLO, MODEL__SOLO__NMS="mask")))


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


@pytest.mark.parametrize("wrong", ["score", "box", "class", "missing", "mask"])
def test_a_detection_that_differs_is_found(wrong):
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 20, 20]])
    ours = [boxes.clone(), torch.tensor([0.9, 0.5]), torch.tensor([1, 2]), torch.tensor([0, 0])]
    theirs = [x.clone() for x in ours]
    assert _compare_detections(theirs, ours, TOLERANCES["fp32"], "x")[:4] == (2, 2, 0.0, 0.0)
    if wrong == "missing":
        ours = [x[:1] for x in ours]
    elif wrong == "mask":
        masks = torch.zeros(2, 8, 8, dtype=torch.bool)
        theirs.append(masks.clone())
        masks[1, 2:4] = True
        ours.append(masks)
    else:
        place, change = {"score": (1, 2e-4), "box": (0, 0.1), "class": (2, 1)}[wrong]
        ours[place][1] += change
    found = _compare_detections(theirs, ours, TOLERANCES["fp32"], "x")
    assert found[:2] == (2, 1) and "and 1 agree" in found.words


def test_rows_with_few_candidates_are_filled_up_with_what_no_threshold_admits():
    scores = torch.tensor([[0.2, 0.7, 0.1]])
    best, index = top_candidates(scores, 5)
    assert index.tolist() == [[1, 0, 2, 0, 0]] and best[0, 3:].tolist() == [NOTHING, NOTHING]
    assert top_candidates(scores, 2)[1].tolist() == [[1, 0]]


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


def test_torch_writes_over_an_earlier_export_and_over_nothing_else(tmp_path):
    cfg = config(FASTER_RCNN)
    net, target = model(cfg), tmp_path / "student.pth"
    for name in ("student.yaml", "student.txt"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(ExportError, match=rf"{name} is there.* not of an earlier export"):
            export_plain(cfg, net, target, NAMES)
        assert (tmp_path / name).read_text() == "mine" and not target.exists()
        (tmp_path / name).unlink()
    for _ in range(2):
        assert all(file.exists() for file in export_plain(cfg, net, target, NAMES))


def test_torch_refuses_what_plain_detectron2_does_not_have(tmp_path):
    cfg = detector("FCOS")
    with pytest.raises(ExportError, match="META_ARCHITECTURE is FCOS, which plain Detectron2 does not have"):
        export_plain(cfg, model(cfg), tmp_path / "student.pth")
    assert not list(tmp_path.iterdir())


def test_the_command_exports_and_tells_what_is_wrong_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["d2kd"])
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
        ((weights,), "is the checkpoint that is exported"),
        ((tmp_path / "x.onnx",), "x.onnx: without --format a PyTorch checkpoint is written"),
        ((tmp_path / "x.onnx",), "Give --format onnx, or another name."),
        ((tmp_path / "x.ts", "--config-file", yaml), "Give --format torchscript"),
        ((tmp_path / "x.safetensors",), "ends in .pth and not in .safetensors"),
        ((tmp_path / "x.pth", "--precision", "fp16"), "--precision is for --format torchscript or onnx"),
        ((tmp_path / "student.pth", "--format", "torch", "--config-file", yaml), "student.yaml is there"),
        ((yaml / "x.pt", "--format", "torchscript", "--config-file", yaml), "cannot be written"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(["export", *map(str, (weights, *words))])
        assert end.value.code == 2 and message in capsys.readouterr().out.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pth", "student.yaml", "x.pt"]


def test_missing_packages_are_told_with_what_installs_them(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"needs onnx, onnxruntime, onnxscript.*pip install 'd2kd\[onnx\]'"):
        export_model(config(), None, tmp_path / "x.onnx", "onnx")
