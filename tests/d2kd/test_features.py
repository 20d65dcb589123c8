"""`d2kd features`: what is computed, drawn and written, and what goes wrong."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from models import FASTER_RCNN, batch, config, model
from runs import ROOT, make_trainer, run_training
from torch import nn

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.cli import features
from d2kd.distillers import FeatureMimic, LogitKD, MaskedGenerative, TapInfo, TapPair
from d2kd.engine import load_config
from d2kd.engine.compared_models import load_compared_models
from d2kd.errors import UserError
from d2kd.evaluation.report import write_report
from d2kd.evaluation.results import ModelResult
from d2kd.layers import linear_cka, principal_axes, ridge_weights, standardize_channels
from d2kd.modeling import Teacher
from d2kd.modeling.checkpoint_files import write_checkpoint
from d2kd.modeling.feature_comparison import compare
from d2kd.modeling.feature_recording import (
    TEACHER,
    FeatureRecorder,
    MapPair,
    RecordedMap,
    _shared,
    named_pairs,
    pairs_of_distillers,
)
from d2kd.visualization import FeatureRow, feature_picture
from d2kd.visualization.features import DIFFERENCE_COLORS, MEAN_COLORS, TILE, tinted, wrapped


def rows(positions: int, channels: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(positions, channels, generator=torch.Generator().manual_seed(seed)).double()


# ---- the numbers ----


@pytest.mark.parametrize(("positions", "channels"), [(12, 3), (5, 8)])
def test_cka_is_that_of_the_paper_and_does_not_see_rotation_and_scale(positions, channels):
    x, y = rows(positions, channels), rows(positions, channels + 2, seed=1) + 3

    def hsic(a, b):  # Kornblith et al., eq. 3, kernel by kernel
        n = len(a)
        center = np.eye(n) - 1 / n
        total = 0.0
        kernels = [[[float(p @ q) for q in x] for p in x] for x in (a, b)]
        k, m = (center @ np.array(kernel) @ center for kernel in kernels)
        for i in range(n):
            for j in range(n):
                total += k[i, j] * m[j, i]
        return total / (n - 1) ** 2

    literal = hsic(x, y) / (hsic(x, x) * hsic(y, y)) ** 0.5
    assert linear_cka(x, y) == pytest.approx(literal, abs=1e-12)
    turn = torch.linalg.qr(rows(channels, channels, seed=2))[0]
    assert linear_cka(x @ turn * 7 - 2, y) == pytest.approx(literal, abs=1e-12)
    assert linear_cka(x, x @ turn) == pytest.approx(1)
    assert linear_cka(x, torch.ones_like(y)) == 0


def test_channels_are_standardized_whatever_their_scale_and_constant_ones_are_zero():
    x = rows(40, 3) * torch.tensor([1e-9, 1.0, 1e6]) + torch.tensor([0.0, 5.0, -1e6])
    s = standardize_channels(torch.cat([x, torch.full((40, 1), 0.1).double(), torch.zeros(40, 1).double()], dim=1))
    torch.testing.assert_close(s[:, :3].mean(0), torch.zeros(3).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(s[:, :3].square().mean(0), torch.ones(3).double())
    assert not s[:, 3:].any()


def test_principal_axes_are_those_that_a_map_was_made_of():
    axes = torch.linalg.qr(rows(6, 6, seed=4))[0][:, :3]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    amounts = torch.linalg.qr(rows(50, 3, seed=5) - rows(50, 3, seed=5).mean(0))[0] * torch.tensor([5.0, 3.0, 1.0])
    found, shares = principal_axes([amounts @ axes.T])
    torch.testing.assert_close(found, axes)
    torch.testing.assert_close(shares, torch.tensor([25.0, 9.0, 1.0]).double() / 35)
    # two maps together, each counting alike whatever its positions
    one, other = torch.zeros(10, 2).double(), torch.zeros(40, 2).double()
    one[:, 0], other[:, 1] = 2.0, 1.0
    found, shares = principal_axes([one, other])
    assert found.shape == (2, 2) and shares.tolist() == pytest.approx([0.8, 0.2])


@pytest.mark.parametrize("positions", [4, 30])
def test_the_fit_is_ridge_regression(positions):
    x, y = rows(positions, 6), rows(positions, 2, seed=1)
    weights = ridge_weights(x, y, 0.3).requires_grad_()
    loss = (x @ weights - y).square().sum() / positions + 0.3 * weights.square().sum()
    (slope,) = torch.autograd.grad(loss, weights)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0)


# ---- maps ----

PAIR = TapPair(TapInfo("p3", 5, 8), TapInfo("p3", 5, 8))


def recorded(teacher: list[torch.Tensor], students: dict[str, list[torch.Tensor]], aligned: bool) -> list[RecordedMap]:
    return [
        RecordedMap(
            t, {r: x[i] for r, x in students.items()}, {r: x[i] for r, x in students.items()} if aligned else {}
        )
        for i, t in enumerate(teacher)
    ]


def maps(seed: int, channels: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(channels, *size, generator=generator) for size in ((6, 7), (4, 9), (5, 5))]


def test_equal_maps_have_equal_colors_and_opposite_ones_the_largest_difference():
    t = maps(0)
    found = compare(
        MapPair(PAIR, nn.Identity(), "as it is"),
        recorded(t, {"before": [-3 * x + 1 for x in t], "after": [2 * x - 4 for x in t]}, aligned=True),
    )
    assert [m.means[TEACHER].shape for m in found.maps] == [(6, 7), (4, 9), (5, 5)]
    for m in found.maps:
        np.testing.assert_allclose(m.colors["after"], m.colors[TEACHER], atol=1e-6)
        np.testing.assert_allclose(m.means["after"], m.means[TEACHER], atol=1e-6)
        np.testing.assert_allclose(m.means["before"], -m.means[TEACHER], atol=1e-6)
        np.testing.assert_allclose(m.differences["after"], 0, atol=1e-6)
        assert 0 <= m.colors["before"].min() and m.colors["before"].max() <= 1
    after, before = found.numbers["after"], found.numbers["before"]
    assert (after.cosine, after.cka, after.difference) == pytest.approx((1, 1, 0), abs=1e-6)
    assert (before.cosine, before.cka) == pytest.approx((-1, 1), abs=1e-6)
    assert before.difference == pytest.approx(2, rel=0.1) and found.positions == 103
    # the very same map gets the very same colors
    same = compare(MapPair(PAIR, nn.Identity(), ""), recorded(t, {"after": t}, aligned=True))
    assert all((m.colors["after"] == m.colors[TEACHER]).all() for m in same.maps)


def test_differences_and_cosines_are_those_of_standardized_channels():
    t, s = maps(0), maps(1)
    found = compare(MapPair(PAIR, nn.Identity(), ""), recorded(t, {"after": s}, aligned=True))
    flat = [np.concatenate([x.flatten(1).T.double().numpy() for x in m]) for m in (t, s)]
    t0, s0 = ((x - x.mean(0)) / x.std(0) for x in flat)
    np.testing.assert_allclose(found.maps[0].differences["after"].ravel(), np.sqrt(((s0 - t0) ** 2).mean(1))[:42])
    np.testing.assert_allclose(found.maps[0].means["after"].ravel(), s0.mean(1)[:42], atol=1e-7)
    cosines = (s0 * t0).sum(1) / np.linalg.norm(s0, axis=1) / np.linalg.norm(t0, axis=1)
    by_image = [part.mean() for part in np.split(cosines, [42, 78])]
    assert found.numbers["after"].cosine == pytest.approx(np.mean(by_image))
    squares = [np.sqrt(part.mean()) for part in np.split(((s0 - t0) ** 2), [42, 78])]
    assert found.numbers["after"].difference == pytest.approx(np.mean(squares))


def test_a_student_without_common_channels_is_fitted_to_the_teacher_by_other_images():
    t = maps(0, channels=3)
    turned = [torch.einsum("dc,chw->dhw", rows(4, 3, seed=3).float(), x) for x in t]
    noise = maps(9, channels=40)  # as many channels as positions: it could be bent to anything
    found = compare(MapPair(TapPair(TapInfo("p3", 4, 8), TapInfo("p3", 3, 8))), recorded(t, {"after": turned}, False))
    assert "fitted" in found.how and "other images" in found.how
    assert found.numbers["after"].cosine > 0.9 and found.numbers["after"].difference < 0.4
    for m in found.maps:
        assert np.abs(m.colors["after"] - m.colors[TEACHER]).mean() < 0.1
    other = compare(MapPair(TapPair(TapInfo("p3", 40, 8), TapInfo("p3", 3, 8))), recorded(t, {"after": noise}, False))
    assert abs(other.numbers["after"].cosine) < 0.3 and other.numbers["after"].difference > 1.2
    alone = compare(MapPair(PAIR), recorded(t[:1], {"after": noise[:1]}, False))
    assert "flatters" in alone.how


@pytest.mark.parametrize("cells", [1, 4, 25])
def test_a_student_that_knows_nothing_of_the_teacher_is_not_like_it(cells):
    # every image has a mean of its own, as the maps of networks do: by the others' it would be known
    found = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(2, 6, 16, 1, cells, generator=generator)
        one, other = drawn + 3 * torch.randn(2, 6, 16, 1, 1, generator=generator)
        pair = MapPair(TapPair(TapInfo("p3", 16, 8), TapInfo("p3", 16, 8)))
        found.append(compare(pair, recorded(list(one), {"after": list(other)}, False)).numbers["after"])
    assert abs(np.mean([x.cosine for x in found])) < 0.15
    assert np.mean([x.difference for x in found]) > 1.25


def test_maps_come_on_the_grid_of_the_teacher_without_padding():
    student, teacher = model(config(), seed=1), model(config(), seed=2)
    pairs, _ = named_pairs(student, teacher, ["p4=p3", "res2=p4", "p3"])
    recorder = FeatureRecorder(Teacher(teacher), {"after": student}, pairs)
    (image,) = batch([(50, 90)])
    found = recorder({key: image[key] for key in ("image", "height", "width")})
    assert {name: tuple(m.teacher.shape) for name, m in found.items()} == {
        "p4 <- p3": (8, 7, 12),
        "res2 <- p4": (8, 4, 6),
        "p3": (8, 7, 12),
    }
    assert all(m.students["after"].shape[1:] == m.teacher.shape[1:] for m in found.values())
    with torch.no_grad():
        same = student.backbone(student.preprocess_image([image]).tensor)["p3"][0, :, :7, :12]
    torch.testing.assert_close(found["p3"].students["after"], same)


def test_methods_say_how_channels_are_aligned():
    pairs = [TapPair(TapInfo("p3", 4, 8), TapInfo("p3", 6, 8)), TapPair(TapInfo("p4", 6, 16), TapInfo("p4", 6, 16))]
    mimic = FeatureMimic(pairs=pairs)
    found, left_out = pairs_of_distillers({"MaskedGenerative": MaskedGenerative(pairs=pairs), "FeatureMimic": mimic})
    assert [p.name for p in found] == ["p3", "p4"] and not left_out
    assert "1x1 conv 4 -> 6" in found[0].how and found[1].how == "as FeatureMimic compares them, channel by channel"
    x = torch.randn(1, 4, 3, 3)
    torch.testing.assert_close(found[0].align(x), mimic.align[0](x))
    (alone, _), _ = pairs_of_distillers({"MaskedGenerative": MaskedGenerative(pairs=pairs)})
    assert alone.align is None
    logits = TapPair(TapInfo("logits", 10, 0), TapInfo("logits", 10, 0))
    assert pairs_of_distillers({"LogitKD": LogitKD(pairs=[logits], form="softmax")})[1].keys() == {"logits"}


def test_what_is_no_map_is_named_and_left_out():
    rcnn = model(config(FASTER_RCNN))
    pairs, left_out = named_pairs(rcnn, rcnn, ["p3", "roi_heads.box_head", "roi_heads.box_predictor.cls_score"])
    assert [p.name for p in pairs] == ["p3"]
    assert left_out.keys() == {"roi_heads.box_head", "roi_heads.box_predictor.cls_score"}
    # a tap that gives a map of the square image that shapes are seen on, and none of this one
    retina = model(config())
    recorder = FeatureRecorder(Teacher(retina), {"after": retina}, named_pairs(retina, retina, ["p3", "p4"])[0])
    retina.backbone.fpn_output4.register_forward_hook(lambda *_: None)
    recorder.pairs[1] = MapPair(TapPair(TapInfo("head.cls_score@9", 8, 8), TapInfo("head.cls_score@9", 8, 8)))
    (image,) = batch([(64, 64)])
    assert recorder({"image": image["image"]}).keys() == {"p3"}
    assert "did not fire" in recorder.left_out["head.cls_score@9"]


def test_backbones_without_a_common_name_are_paired_by_stride():
    student, teacher = model(config()), model(config(FASTER_RCNN))
    teacher.backbone._out_features = [f"other_{name}" for name in teacher.backbone._out_features]
    for table in ("_out_feature_strides", "_out_feature_channels"):
        setattr(teacher.backbone, table, {f"other_{k}": v for k, v in getattr(teacher.backbone, table).items()})
    with pytest.raises(UserError, match="--taps 'p3=': name a tap"):
        named_pairs(student, teacher, ["p3="])
    assert ("p3", "other_p3") in _shared(student, teacher, 0, "--taps")


# ---- the picture ----


def test_a_cell_is_drawn_where_it_is_in_the_image_and_equal_maps_alike():
    image = np.full((60, 135, 3), 50, np.uint8)
    mean = np.zeros((8, 17), np.float64)  # stride 8: the last row and column reach beyond the image
    mean[0, 0], mean[7, 16], mean[3, 6] = 1.0, -1.0, 0.5
    difference = np.abs(mean)
    colors = np.zeros((8, 17, 3))
    colors[3, 6] = (1, 0.5, 0)
    names = ("teacher", "student after")
    row = FeatureRow(
        "p3",
        "about",
        8.0,
        dict.fromkeys(names, mean),
        2.0,
        dict.fromkeys(names, colors),
        {"student after": difference},
        {"student after": "0.1"},
    )
    drawn = feature_picture(image, [row, row], 1.0, "heading", ["note"])
    zoom = TILE / 90  # the tile has the area of a square one
    height, width = 100, 225
    boxes = [
        (x, y)
        for y in range(drawn.shape[0] - height)
        for x in range(drawn.shape[1] - width)
        if (drawn[y, x] == 50).all() and (drawn[y : y + height, x : x + width] == 50).all()
    ]
    assert len(boxes) == 2, "an image for each row"
    left, top = boxes[0]
    places = [left + width + 24, left + 2 * width + 32, left + 3 * width + 56, left + 4 * width + 64]
    tiles = [drawn[top : top + height, x : x + width][:, :, ::-1] for x in [*places, left + 5 * width + 88]]
    assert (tiles[0] == tiles[1]).all() and (tiles[2] == tiles[3]).all()
    assert (tiles[0][2, 2] == tinted(np.array(0.75), MEAN_COLORS)).all()
    assert (tiles[0][-1, -1] == tinted(np.array(0.25), MEAN_COLORS)).all()
    middle = int(3.5 * 8 * zoom), int(6.5 * 8 * zoom)
    assert tiles[2][middle].tolist() == [255, 128, 0] and tiles[2][2, 2].tolist() == [0, 0, 0]
    assert (tiles[4][middle] == tinted(np.array(0.5), DIFFERENCE_COLORS)).all()


@pytest.mark.parametrize("width", [240, 1500])
def test_no_text_is_cut_off_at_the_right_edge(width):
    """Letters are of all widths; a text in the widest is as far inside as any."""
    image = np.full((60, width, 3), 50, np.uint8)
    wide = "W" * 300 + " " + "MW WM " * 60
    maps = {"teacher": np.zeros((8, 17)), "student": np.zeros((8, 17))}
    row = FeatureRow(
        wide, wide, 8.0, maps, 1.0, dict.fromkeys(maps, np.zeros((8, 17, 3))), {"student": maps["student"]}, {}
    )
    drawn = feature_picture(image, [row, row], 1.0, f"heading {wide}", [wide, "a note"])
    assert (drawn[:, -10:] == 255).all()
    one = feature_picture(image, [row._replace(title="p3", about="about")] * 2, 1.0, "heading", ["a note"])
    assert drawn.shape[1] == one.shape[1] and drawn.shape[0] > one.shape[0] + 100


def test_texts_are_wrapped_by_their_width():
    narrow, wide = wrapped("il " * 100, 200, 9), wrapped("WM " * 100, 200, 9)
    assert len(wide) > 2 * len(narrow) and " ".join(wide) == ("WM " * 100).strip()
    assert "".join(wrapped("/a/path" * 40, 200, 9)) == "/a/path" * 40
    assert wrapped("", 200, 9) == [] and wrapped("W", 1, 9) == ["W"]


# ---- the command ----


def call(*arguments: Any) -> Any:
    return features.main(features.argument_parser().parse_args(list(map(str, arguments))))


@pytest.fixture
def student(write_config, teacher):
    """A distilled run whose aligners are convolutions; returns its folder, and the weights that it started with."""
    changes = {"DISTILL__METHODS": ["FeatureMimic"], "MODEL__FPN__OUT_CHANNELS": 4}
    path = write_config("student", SOLVER__MAX_ITER=2, SOLVER__WARMUP_ITERS=0, **changes, **teacher)
    start = make_trainer(path)
    start.resume_or_load(resume=False)
    first = {key: value.clone() for key, value in start.student.state_dict().items()}
    trainer = run_training(path)
    write_yaml = Path(trainer.cfg.OUTPUT_DIR, "config.yaml")
    write_yaml.write_text(trainer.cfg.dump())
    return Path(trainer.cfg.OUTPUT_DIR), first


def test_the_command_shows_the_trained_student_and_its_start(student, digits, tmp_path):
    run, first = student
    cfg = load_config(str(run / "config.yaml"))
    models = load_compared_models(cfg, str(run / "model_final.pth"))
    before = models.students["before"].state_dict()
    assert all(torch.equal(before[key], value) for key, value in first.items()), "what the run started with"
    saved = torch.load(run / "model_final.pth", weights_only=True)
    assert all(torch.equal(models.students["after"].state_dict()[k], v) for k, v in saved["model"].items())
    align = models.distillers["FeatureMimic"].align[0].weight
    assert torch.equal(align, saved["distillers"]["FeatureMimic.align.0.weight"])

    broken = tmp_path / "photographs" / "broken.png"
    broken.parent.mkdir()
    broken.write_bytes(b"no image")
    cv2.imwrite(str(broken.parent / "wide.jpg"), np.random.default_rng(0).integers(0, 255, (40, 90, 3), np.uint8))
    summary = call("--weights", run / "model_final.pth", "--number", 3, "--images", digits / "val", broken.parent)
    assert len(summary.pictures) == 3 and not summary.skipped
    summary = call("--weights", run / "model_final.pth", "--images", broken.parent, digits / "val", "--overwrite")
    folder = run / "features"
    assert sorted(p.name for p in folder.iterdir()) == sorted([*(p.name for p in summary.pictures), "features.json"])
    assert "wide.png" in {p.name for p in summary.pictures} and len(summary.pictures) == 5
    assert len(summary.skipped) == 1 and "broken.png" in summary.skipped[0]
    content = json.loads((folder / "features.json").read_text())
    assert content["skipped"] == summary.skipped
    assert [tap["student"] for tap in content["taps"]] == ["p3", "p4"]
    for tap in content["taps"]:
        assert "1x1 conv 4 -> 8" in tap["alignment"] and tap["channels"] == {"student": 4, "teacher": 8}
        for role in ("before", "after"):
            assert 0 <= tap[role]["cka"] <= 1 and -1 <= tap[role]["cosine"] <= 1 and tap[role]["difference"] > 0
    for path in summary.pictures:
        assert cv2.imread(str(path)).shape[1] > 1000

    distilled = ModelResult("distilled", {"AP": 1.0}, checkpoint=str(run / "model_final.pth"))
    report = write_report(tmp_path / "report", {"distilled": distilled})
    assert report["features"] == [f"../student/features/{p.name}" for p in summary.pictures[:3]]
    text = (tmp_path / "report/report.md").read_text()
    assert "## Features" in text and all(f"(<{link}>)" in text for link in report["features"])
    assert all((tmp_path / "report" / link).is_file() for link in report["features"])


def test_a_student_without_distillers_is_fitted(student, tmp_path):
    run, _ = student
    saved = torch.load(run / "model_final.pth", weights_only=True)
    plain = tmp_path / "plain.pth"
    write_checkpoint(plain, {"model": saved["model"]})
    arguments = ("--config-file", run / "config.yaml", "--weights", plain, "--output", tmp_path / "seen")
    summary = call(*arguments, "--no-before", "--taps", "p3", "res3", "head.cls_score@0", "--number", 2)
    assert [tap.pair.name for tap in summary.taps] == ["p3", "res3", "head.cls_score@0"]
    assert all("fitted" in tap.how and tap.numbers.keys() == {"after"} for tap in summary.taps)
    # of the configuration's methods others than those of the checkpoint
    call(
        *arguments, "--overwrite", "--number", 1, "--before", run / "model_final.pth", "--opts", "DISTILL.METHODS", "[]"
    )
    content = json.loads((tmp_path / "seen/features.json").read_text())
    assert content["before"] == str(run / "model_final.pth") and len(content["images"]) == 1
    assert content["taps"][0]["before"] == content["taps"][0]["after"]


def test_the_same_network_is_its_own_teacher(teacher, tmp_path):
    path, weights = teacher["DISTILL__TEACHER__CONFIG_FILE"], teacher["DISTILL__TEACHER__WEIGHTS"]
    arguments = ("--config-file", path, "--weights", weights, "--teacher-config", path, "--teacher-weights", weights)
    summary = call(*arguments, "--output", tmp_path / "seen", "--number", 4, "--no-before")
    for tap in summary.taps:
        assert tap.numbers["after"].cka == pytest.approx(1) and tap.numbers["after"].cosine > 0.9


def test_a_file_name_that_is_not_utf8_is_shown_as_what_stands_for_it(teacher, digits, tmp_path):
    path, weights = teacher["DISTILL__TEACHER__CONFIG_FILE"], teacher["DISTILL__TEACHER__WEIGHTS"]
    image = tmp_path / "caf\udce9.png"
    shutil.copy(next((digits / "val").iterdir()), image)
    arguments = ("--config-file", path, "--weights", weights, "--teacher-config", path, "--teacher-weights", weights)
    summary = call(*arguments, "--output", tmp_path / "seen", "--no-before", "--images", image)
    assert [picture.name for picture in summary.pictures] == ["caf_.png"]
    assert json.loads((tmp_path / "seen/features.json").read_text())["images"][0]["file"] == str(image)


def test_the_examples_of_the_documentation_run_as_printed(student, teacher, digits, tmp_path, monkeypatch):
    run, _ = student
    text = (ROOT / "docs/features.md").read_text(encoding="utf-8")
    first, second = (
        shlex.split(c.replace("\\\n", "")) for c in re.findall(r"```bash\n(d2kd features.*?)```", text, re.DOTALL)
    )
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "output/distilled")
    assert call(*first[2:], "--number", 1).pictures[0].parent == Path("output/distilled/features")
    shutil.copytree(digits / "val", "photographs")
    shutil.copy(run / "config.yaml", "student.yaml")
    shutil.copy(run / "model_final.pth", "student.pth")
    assert [tap.pair.name for tap in call(*second[2:]).taps] == ["p3", "res3", "p4 <- p3"]
    flags = set(re.findall(r"--[a-z-]+", features.argument_parser().format_help())) - {"--help"}
    assert flags <= set(re.findall(r"--[a-z-]+", text))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "no.pth"], "--weights is 'no.pth': there is no such file"),
        (["--weights", "{weights}", "--before", "no.pth"], "--before is 'no.pth': there is no such file"),
        (["--weights", "{weights}", "--number", "0"], "--number is 0; it must be from 1 to 50"),
        (["--weights", "{weights}", "--config-file", "{config}"], "There is no teacher to compare with"),
        (["{teacher}", "--images", "{empty}"], "holds no images"),
        (["{teacher}", "--images", "{broken}"], "Image .*broken.png cannot be read"),
        (["{teacher}", "--images", "none.png"], "There is no none.png"),
        (["{teacher}", "--taps", "p9"], "Tap 'p9' is not in the RetinaNet"),
        (["{teacher}", "--taps", "p3=p7"], "stride 8.*stride 128"),
        (["{teacher}", "--before", "{other}"], "does not fit its configuration .--config-file and --before"),
        (["{teacher}", "--opts", "MODEL.WEIGHTS", "no.pth"], "started with cannot be loaded: .*no.pth.*--no-before"),
        (["{teacher}", "--opts", "MODEL.WEIGHTS", "{weights}"], "is the trained student itself"),
        (["{teacher}", "--output", "{broken}/below"], "cannot be written|is a file"),
        (["{teacher}", "--output", "{full}"], "is not empty"),
        (["{teacher}", "--opts", "DATASETS.TEST", "()"], "give --images, or a dataset in DATASETS.TEST"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(arguments, message, teacher, tmp_path):
    path, weights = teacher["DISTILL__TEACHER__CONFIG_FILE"], teacher["DISTILL__TEACHER__WEIGHTS"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("mine")
    (tmp_path / "broken.png").write_bytes(b"no image")
    write_checkpoint(tmp_path / "other.pth", {"model": model(config(MODEL__FPN__OUT_CHANNELS=4)).state_dict()})
    places = {"weights": weights, "config": path, **{n: tmp_path / n for n in ("empty", "full")}}
    places |= {"broken": tmp_path / "broken.png", "other": tmp_path / "other.pth"}
    line = [part for word in arguments for part in (_TEACHER if word == "{teacher}" else [word])]
    line = [word.format(**places) for word in line]
    if "--output" not in line:
        opts = line.index("--opts") if "--opts" in line else len(line)
        line[opts:opts] = ["--output", str(tmp_path / "new" / "seen")]
    with pytest.raises(UserError, match=message):
        call(*line)
    assert not (tmp_path / "new").exists()
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["kept.txt"]


_TEACHER = ["--weights", "{weights}", "--config-file", "{config}", "--teacher-config", "{config}"]
_TEACHER += ["--teacher-weights", "{weights}"]
