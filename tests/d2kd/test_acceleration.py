"""A faster copy of the teacher gives the features of the teacher, which stays as it is."""

import copy
import shutil

import pytest
import torch
from models import FASTER_RCNN, RETINANET, batch, config, model, write_teacher
from torch import nn

from d2kd.errors import ConfigError
from d2kd.modeling import build_distilled_model, initialize_student
from d2kd.modeling.teacher import Teacher
from d2kd.modeling.teacher_passes import Acceleration, DensePass
from d2kd.modeling.teacher_passes.acceleration import LARGE_DRIFT, fold_norms, report_drift
from detectron2.layers import Conv2d, FrozenBatchNorm2d

PYRAMID = ["p3", "p4", "p5"]


def lively(network: nn.Module) -> nn.Module:
    """With statistics in its norms that no initialization gives."""
    generator = torch.Generator().manual_seed(3)
    for module in network.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return network


def distance(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.fixture(params=["BN", "FrozenBN", "SyncBN"])
def teacher(request):
    return Teacher(lively(model(config(MODEL__RESNETS__NORM=request.param, MODEL__FPN__NORM=request.param))).eval())


@pytest.mark.parametrize(
    "given",
    [
        Acceleration(fold_norms=True),
        Acceleration(channels_last=True),
        Acceleration(fold_norms=True, channels_last=True, stream=True),
    ],
)
@pytest.mark.parametrize("taps", [PYRAMID, ["res3", "res4.pre_relu"], ["res5.0.conv1.norm", "fpn_output3.pre_norm"]])
def test_features_are_the_teachers_which_stays(teacher, given, taps):
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    want = DensePass(teacher, taps)(batch()).maps
    got = DensePass(teacher, taps, given)(batch()).maps
    for tap in taps:
        assert distance(got[tap], want[tap]) < 1e-4  # of rounding, which random weights make larger layer by layer
    after = teacher.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(before[name], after[name]) for name in before)


def test_norms_are_gone_and_what_does_not_change_is_shared(teacher):
    faster = Acceleration(fold_norms=True).of(teacher, ["res5.0.conv1.norm"])
    norms = [name for name, module in faster.model.named_modules() if hasattr(module, "running_var")]
    assert norms == ["backbone.bottom_up.res5.0.conv1.norm"]  # that one is wanted as it is
    ours, theirs = dict(teacher.model.named_parameters()), dict(faster.model.named_parameters())
    assert theirs["head.cls_score.weight"] is ours["head.cls_score.weight"]
    assert Acceleration().of(teacher, PYRAMID) is teacher


def test_sequences_and_biases_are_folded_and_what_is_shared_or_more_than_a_norm_stays():
    class NormAndReLU(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    shared = nn.Conv2d(4, 4, 1)
    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        Conv2d(4, 4, 3, bias=True, norm=FrozenBatchNorm2d(4)),
        nn.Sequential(shared, nn.BatchNorm2d(4)),
        nn.Sequential(shared, nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(4, 4, 1), NormAndReLU(4)),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
    )
    network = lively(network).eval().requires_grad_(False)
    x = torch.randn(2, 3, 16, 16)
    want = network(x)
    assert fold_norms(network) == 2
    torch.testing.assert_close(network(x), want, rtol=1e-4, atol=1e-5)


def test_a_convolution_whose_output_is_wanted_keeps_it():
    network = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))).eval()
    x = torch.randn(2, 3, 16, 16)
    want = network[0](x)
    assert fold_norms(network, [network[0]]) == 0 and torch.equal(network[0](x), want)


def test_maps_are_channels_last(teacher):
    maps = DensePass(teacher, PYRAMID, Acceleration(channels_last=True))(batch()).maps
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in maps.values())


@pytest.mark.parametrize("taps", [PYRAMID, ["res3.1", "p4"], ["res4.pre_relu"], ["head.cls_score@0", "res4"]])
def test_compiled_parts_end_where_taps_are(teacher, taps, monkeypatch):
    compiled = []

    def compile_nothing(function, mode):
        compiled.append(function.__self__)
        return torch._dynamo.disable(function)

    monkeypatch.setattr(torch, "compile", compile_nothing)
    want = DensePass(teacher, taps)(batch()).maps
    faster = DensePass(teacher, taps, Acceleration(compile="default"))
    got = faster(batch()).maps
    assert compiled and all(torch.equal(got[tap], want[tap]) for tap in taps)
    tapped = [tap for tap in faster._taps.taps]
    for region in compiled:
        inner = [m for m in region.modules() if m is not region]
        assert not any(tap.module is m for tap in tapped for m in inner)
        assert not any(tap.pre_relu and m is region for tap in tapped for m in tap.module.modules())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_teacher_gives_its_features():
    given = Teacher(lively(model(config())).eval())
    want = DensePass(given, ["stem"])(batch()).maps
    got = DensePass(given, ["stem"], Acceleration(fold_norms=True, compile="default"))(batch()).maps
    assert all(distance(got[tap], want[tap]) < 1e-4 for tap in want)


@pytest.mark.parametrize("base", [RETINANET, FASTER_RCNN])
def test_a_student_is_initialized_and_trained_as_from_the_teacher(tmp_path, base):
    losses, weights = [], []
    for faster in (False, True):
        changes = {"DISTILL__TEACHER__FOLD_NORMS": faster, "DISTILL__TEACHER__CHANNELS_LAST": faster}
        cfg = config(base, **write_teacher(tmp_path, config(base)), **changes)
        torch.manual_seed(0)
        distilled = build_distilled_model(cfg)
        initialize_student(cfg, distilled)
        weights.append(copy.deepcopy(distilled.student.state_dict()))
        torch.manual_seed(1)
        losses.append({name: loss.item() for name, loss in distilled.train()(batch()).items()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_drift_is_told_once_and_a_large_one_is_a_warning(teacher, caplog):
    caplog.set_level("INFO")
    half = Teacher(teacher.model, precision="bfloat16")
    run = DensePass(half, PYRAMID)
    for _ in range(2):
        run(batch())
    (told,) = [r for r in caplog.records if "relative error" in r.message]
    assert told.levelname == "INFO" and all(tap in told.message for tap in PYRAMID)
    caplog.clear()
    DensePass(teacher, PYRAMID)(batch())
    assert not caplog.records
    exact = {"p3": torch.ones(1, 1, 2, 2)}
    assert report_drift({"p3": exact["p3"] * 1.5}, exact) == {"p3": 0.5} and 0.5 > LARGE_DRIFT
    report_drift({"p3": exact["p3"] * torch.nan}, exact)
    assert [r.levelname for r in caplog.records] == ["WARNING", "WARNING"]


def test_what_cannot_be_is_told_with_its_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    cfg = config(**write_teacher(tmp_path), DISTILL__TEACHER__COMPILE="default")
    with pytest.raises(ConfigError, match=r"DISTILL\.TEACHER\.COMPILE is default, which needs a C\+\+ compiler"):
        build_distilled_model(cfg)
    cfg.DISTILL.TEACHER.COMPILE, cfg.DISTILL.TEACHER.STREAM = "cudagraphs", True
    with pytest.raises(ConfigError, match="set STREAM False"):
        build_distilled_model(cfg)


def test_a_stream_without_cuda_is_told(tmp_path, caplog):
    cfg = config(**write_teacher(tmp_path), DISTILL__TEACHER__STREAM=True)
    build_distilled_model(cfg).train()(batch())
    assert "DISTILL.TEACHER.STREAM is for CUDA" in caplog.text


def test_a_student_on_the_cpu_of_a_machine_with_a_gpu_uses_no_stream(tmp_path, monkeypatch):
    cfg = config(**write_teacher(tmp_path), DISTILL__TEACHER__STREAM=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", None)
    assert build_distilled_model(cfg).train()(batch())
