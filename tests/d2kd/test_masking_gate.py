"""The gate of a masked teacher: what it measures, and the program."""

import json

import numpy as np
import pytest
import torch
from models import batch
from runs import tool
from test_masked_detectors import distilled

from d2kd.errors import ConfigError
from d2kd.modeling.teacher_passes.drift import Drift, Gate, measure_drift
from d2kd.visualization import kept_picture, sheet


def measured(net, images=2, ratios=(1.0, 0.25)):
    *_, gate = measure_drift(net, iter(lambda: batch([(128, 128), (128, 128)]), None), ratios, images)
    return gate


def test_all_patches_have_no_drift_and_fewer_have_more(tmp_path):
    net = distilled(tmp_path)
    masked = net.passes.others["MaskedTeacher"]
    before = masked.how, masked.saliency
    gate = measured(net)
    found = {(d.selector, d.keep_ratio): d for d in gate.drifts}
    assert set(found) == {(s, r) for s in ("student", "random", "objects") for r in (1.0, 0.25)}
    for selector in ("student", "random", "objects"):
        assert abs(found[selector, 1.0].distance) < 1e-5 < found[selector, 0.25].distance
        assert found[selector, 0.25].time > 0
    assert gate.images == 2 and gate.resized > 0
    assert (masked.how, masked.saliency) == before and net.training


def test_it_ends_after_the_images_that_are_asked_for(tmp_path):
    assert measured(distilled(tmp_path), images=3).images == 3


def test_an_image_that_comes_again_is_not_counted_again(tmp_path):
    """A training set that is smaller than what is asked for comes round."""
    inputs = [{**x, "file_name": f"{i}.png"} for i, x in enumerate(batch([(128, 128)] * 3))]
    *_, gate = measure_drift(distilled(tmp_path), [inputs[:2], [inputs[2], inputs[0]], inputs[:2]], (0.5,), 500)
    assert gate.images == 3


def test_the_smallest_ratio_within_the_drift_of_a_resize_is_recommended():
    drifts = [Drift("student", r, d, 1.0) for r, d in ((0.75, 0.01), (0.5, 0.02), (0.25, 0.2))]
    drifts += [Drift("random", 0.1, 0.0, 1.0)]
    assert Gate(drifts, 0.05, 10).recommended() == 0.5
    assert Gate(drifts, 0.005, 10).recommended() is None and Gate(drifts, 0.005, 10).recommended("random") == 0.1


def test_kept_patches_are_drawn_as_they_are_and_dropped_ones_dark():
    image = np.full((64, 128, 3), (200, 100, 50), np.uint8)
    kept = np.zeros((8, 8), bool)  # a square of 128 pixels: the lower half is padding
    kept[1, 2] = True
    picture = kept_picture(image, kept, 16)
    assert picture.shape == (192, 192, 3) and (picture[96:] == 255).all()
    inside = np.zeros((192, 192), bool)
    inside[24:48, 48:72] = True
    assert (picture[inside] == (200, 100, 50)).all()
    dropped = picture[:96][~inside[:96]]
    assert (dropped < 50).all() and (dropped == dropped[:, :1]).all()  # dark, and gray
    rows = sheet({"first": picture, "second": picture})
    assert rows.shape[1] == 192 and rows.shape[0] > 2 * 192


def test_a_teacher_that_is_not_masked_is_one_line(tmp_path):
    for changes in (
        {"DISTILL__FEATURE_MIMIC__TEACHER_PASS": "auto"},
        {"DISTILL__MASKED_TEACHER__SELECTOR": "random"},
    ):
        with pytest.raises(ConfigError, match=r"MaskedTeacher|SELECTOR is random"):
            measured(distilled(tmp_path, **changes))


def test_the_program_writes_table_numbers_and_plot(digits, tmp_path):
    folder = {"NAME": "crops", "FORMAT": "folders", "IMAGES": str(digits / "classification/train")}
    common = ["MODEL.META_ARCHITECTURE", "ImageClassifier", "MODEL.DEVICE", "cpu", "MODEL.BACKBONE.FREEZE_AT", 0]
    common += ["MODEL.BACKBONE.NAME", "build_timm_network", "MODEL.CLASSIFIER.NUM_CLASSES", 10]
    common += ["INPUT.CLASSIFICATION.SIZE", 64]
    teacher = ["MODEL.TIMM.NAME", "deit_small_patch16_224", "MODEL.TIMM.ARGS", ["depth", 2, "embed_dim", 48]]
    from d2kd.engine import load_config
    from d2kd.modeling import build_network

    cfg = load_config("", [*common, *teacher, "MODEL.TIMM.ARGS", ["depth", 2, "embed_dim", 48, "num_heads", 3]])
    (tmp_path / "teacher.yaml").write_text(cfg.dump())
    torch.manual_seed(3)
    torch.save({"model": build_network(cfg, "teacher").state_dict()}, tmp_path / "teacher.pth")
    options = [*common, "MODEL.TIMM.NAME", "mobilenetv3_small_050", "DATASETS.REGISTER", [folder]]
    options += ["DATASETS.TRAIN", ["crops"], "SOLVER.IMS_PER_BATCH", 4, "DISTILL.METHODS", ["LogitKD"]]
    options += ["DISTILL.TEACHER.CONFIG_FILE", str(tmp_path / "teacher.yaml"), "DATALOADER.NUM_WORKERS", 0]
    options += ["DISTILL.TEACHER.WEIGHTS", str(tmp_path / "teacher.pth"), "DISTILL.INIT_FROM_TEACHER.ENABLED", False]
    options += ["DISTILL.LOGIT_KD.TEACHER_PASS", "MaskedTeacher", "OUTPUT_DIR", str(tmp_path / "gate")]
    student = load_config("", options)
    (tmp_path / "student.yaml").write_text(student.dump())
    run = tool("masking_gate", "--config-file", tmp_path / "student.yaml", "--images", 4, "--ratios", 0.5, 1)
    written = json.loads((tmp_path / "gate/masking.json").read_text())
    assert written["images"] == 4 and len(written["drifts"]) == 6 and written["recommended"] in (0.5, 1.0)
    assert "untrained student" in run.stdout and "| student | 0.5 |" in (tmp_path / "gate/masking.md").read_text()
    assert (tmp_path / "gate/masking.png").stat().st_size > 5000
    there = len(list((digits / "classification/train").rglob("*.png")))
    tool("masking_gate", "--config-file", tmp_path / "student.yaml", "--images", 10 * there, "--ratios", 1)
    assert json.loads((tmp_path / "gate/masking.json").read_text())["images"] == there
    assert f"on {there} images" in (tmp_path / "gate/masking.md").read_text()
    wrong = tool("masking_gate", "--config-file", tmp_path / "student.yaml", "--ratios", 1.5, check=False)
    assert wrong.returncode == 2 and "--ratios must be above 0" in wrong.stdout
    alone = tool("masking_gate", "--config-file", tmp_path / "teacher.yaml", check=False)
    assert alone.returncode == 2 and "no teacher" in alone.stdout and "Traceback" not in alone.stdout
