"""Segmentors: geometry, losses, inference, taps, distillation, references of torchvision, weights, errors."""

import pytest
import torch
import torchvision
from models import config, model, write_teacher
from seg_golden import Recording
from segmentors import PSP, SEGMENTOR, labelled
from torch import nn
from torch.nn import functional as F
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large, deeplabv3_resnet50

from d2kd.config import check_values
from d2kd.errors import ConfigError
from d2kd.modeling import FeatureTaps, build_distilled_model, evaluation_mode
from d2kd.modeling.architectures import architecture_of
from d2kd.modeling.backbone import MobileNetV2
from d2kd.modeling.backbone.dilated_resnet import stage_geometries
from d2kd.modeling.pretrained_names import DEEP_STEM_RESNET, MOBILENET_V2, RESNET_V1C, source_of, to_detectron2
from d2kd.modeling.sem_seg import SlidingWindows, pixel_accuracy, pixel_cross_entropy
from d2kd.modeling.taps import describe_taps
from detectron2.modeling import SemanticSegmentor, build_backbone
from detectron2.utils.events import EventStorage

AUX = "sem_seg_head.auxiliary.predictor"
MAIN = "sem_seg_head.predictor"


@torch.no_grad()
def randomized(net: nn.Module, seed: int = 0) -> nn.Module:
    """A network in evaluation mode whose vectors too are random: biases, affine parameters and batch statistics."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in net.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2.0, generator=generator)
        elif value.dim() == 1 and name.endswith("weight"):
            value.uniform_(0.2, 0.7, generator=generator)
        elif value.dim() == 1:
            value.normal_(0, 0.1, generator=generator)
        elif value.dim() == 4 and value.shape[0] == 21:
            value.normal_(0, 0.5, generator=generator)
    return net.eval()


# --- geometry ---------------------------------------------------------------------


def test_strides_become_dilations():
    blocks = (2, 2, 2, 3)
    assert stage_geometries(blocks, 2, 4) == [(1, [1, 1]), (2, [1, 1]), (1, [1, 2]), (1, [2, 4, 4])]
    assert stage_geometries(blocks, 1, 2) == [(1, [1, 1]), (2, [1, 1]), (2, [1, 1]), (1, [1, 2, 2])]
    assert stage_geometries(blocks, 1, 2, contract=False)[3] == (1, [2, 2, 2])
    assert [stride for stride, _ in stage_geometries(blocks, 1, 1)] == [1, 2, 2, 2]


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("blocks", ["first", "following"])
def test_mobilenet_has_the_output_stride_and_dilates_for_it(output_stride, blocks):
    net = MobileNetV2(width=0.1, output_stride=output_stride, dilated_blocks=blocks, out_features=["res2", "res5"])
    assert net(torch.zeros(1, 3, 64, 64))["res5"].shape[-1] == 64 // output_stride
    assert net.output_shape()["res5"].stride == output_stride
    dilations = [block.depthwise.dilation[0] for stage in net.stages for block in stage]
    lost = 32 // output_stride
    if blocks == "first":
        assert dilations.count(1) >= 13 and max(dilations) == lost
        return
    late = {1: [1] * 4, 2: [1, 2, 2, 2], 4: [2, 4, 4, 4]}[lost]
    assert dilations[-4:] == late and set(dilations[:6]) == {1}


def test_a_dilated_network_of_timm_feeds_the_heads():
    timm = {"MODEL.BACKBONE.NAME": "build_timm_backbone", "MODEL.TIMM.NAME": "mobilenetv3_small_050"}
    timm |= {"MODEL.TIMM.OUT_FEATURES": ["res4", "res5"], "MODEL.TIMM.ARGS": ["output_stride", 8]}
    keys = {k: v for k, v in SEGMENTOR.items() if "RESNETS" not in k}
    net = model(config({**keys, **timm})).train()
    assert set(net(labelled())) == {"loss_sem_seg", "loss_sem_seg_aux"}
    assert net.eval()(labelled(((50, 70),)))[0]["sem_seg"].shape == (4, 50, 70)


# --- torchvision -------------------------------------------------------------------


def torchvision_head(name: str) -> str:
    """Our name of a parameter of torchvision's DeepLabHead or FCNHead."""
    for old, new in (
        ("classifier.0.convs.4.1.", "sem_seg_head.context.pooled."),
        ("classifier.0.convs.4.2.", "sem_seg_head.context.pooled.norm."),
        *((f"classifier.0.convs.{i}.0.", f"sem_seg_head.context.branches.{i}.") for i in range(4)),
        *((f"classifier.0.convs.{i}.1.", f"sem_seg_head.context.branches.{i}.norm.") for i in range(4)),
        ("classifier.0.project.0.", "sem_seg_head.context.project."),
        ("classifier.0.project.1.", "sem_seg_head.context.project.norm."),
        ("classifier.1.", "sem_seg_head.context.bottleneck."),
        ("classifier.2.", "sem_seg_head.context.bottleneck.norm."),
        ("classifier.4.", "sem_seg_head.predictor."),
        ("aux_classifier.0.", "sem_seg_head.auxiliary.conv."),
        ("aux_classifier.1.", "sem_seg_head.auxiliary.conv.norm."),
        ("aux_classifier.4.", "sem_seg_head.auxiliary.predictor."),
    ):
        if name.startswith(old):
            return name.replace(old, new)
    return name


TORCHVISION = {
    **SEGMENTOR,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 21,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 256,
    "MODEL.SEM_SEG_HEAD.ASPP_CHANNELS": 256,
    "MODEL.SEM_SEG_HEAD.ASPP_FORM": "project",
    "MODEL.SEM_SEG_HEAD.AUX_CHANNELS": 256,
    "MODEL.PIXEL_MEAN": [0.0, 0.0, 0.0],
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
}


def same_logits(theirs: nn.Module, ours: nn.Module, aux: bool, size: tuple[int, int] = (65, 89)) -> None:
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    recording = FeatureTaps(ours, [AUX] if aux else [MAIN])
    with torch.no_grad():
        want, got = theirs(images), ours([{"image": image} for image in images])
        with recording.recording() as taps:
            ours([{"image": image} for image in images])
    out = torch.stack([x["sem_seg"] for x in got])
    assert want["out"].std() > 0.1
    assert (out - want["out"]).abs().max() < 1e-4 * want["out"].abs().max()
    if aux:
        upsampled = F.interpolate(taps[AUX], images.shape[-2:], mode="bilinear", align_corners=False)
        assert (upsampled - want["aux"]).abs().max() < 1e-4 * want["aux"].abs().max()


def test_deeplabv3_resnet50_is_torchvisions():
    torch.manual_seed(0)
    theirs = randomized(deeplabv3_resnet50(weights=None, weights_backbone=None, aux_loss=True))
    wide = {"MODEL.RESNETS.DEPTH": 50, "MODEL.RESNETS.STEM_TYPE": "basic", "MODEL.RESNETS.STEM_OUT_CHANNELS": 64}
    wide |= {"MODEL.RESNETS.RES2_OUT_CHANNELS": 256, "MODEL.RESNETS.WIDTH_PER_GROUP": 64}
    ours = model(config({**TORCHVISION, **wide})).eval()
    state = theirs.state_dict()
    backbone, left = to_detectron2(
        {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}, ours.state_dict()
    )
    heads = {torchvision_head(k): v for k, v in state.items() if "classifier" in k}
    assert not left
    ours.load_state_dict({**backbone, **heads}, strict=True)
    same_logits(theirs, ours, aux=True)


def test_deeplabv3_mobilenet_is_torchvisions():
    torch.manual_seed(0)
    theirs = randomized(deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None))
    timm = {
        "MODEL.BACKBONE.NAME": "build_timm_backbone",
        "MODEL.TIMM.NAME": "mobilenetv3_large_100",
        "MODEL.TIMM.OUT_FEATURES": ["res5"],
        "MODEL.TIMM.ARGS": ["output_stride", 16, "bn_eps", 1e-3],
        "MODEL.TIMM.DATA_CONFIG": False,
        "MODEL.SEM_SEG_HEAD.AUX_FEATURE": "",
    }
    keys = {k: v for k, v in TORCHVISION.items() if "RESNETS" not in k}
    ours = model(config({**keys, **timm})).eval()
    state = theirs.state_dict()
    mine = [k for k in ours.state_dict() if k.startswith("backbone.")]
    backbone = [v for k, v in state.items() if k.startswith("backbone.")]  # both list the layers as they are run
    assert len(mine) == len(backbone)
    heads = {torchvision_head(k): v for k, v in state.items() if "classifier" in k}
    ours.load_state_dict({**dict(zip(mine, backbone)), **heads}, strict=True)
    # torchvision dilates the first block of the last stage too
    first = ours.backbone.net.blocks[5][0].conv_dw
    first.dilation, first.padding = (2, 2), (4, 4)
    same_logits(theirs, ours, aux=False, size=(64, 96))  # networks of timm get images of whole cells


# --- losses -----------------------------------------------------------------------


@pytest.mark.parametrize("average", ["valid", "all"])
def test_cross_entropy_and_accuracy_are_those_of_a_loop_over_pixels(average):
    logits = torch.randn(2, 3, 4, 5, dtype=torch.double)
    labels = torch.randint(0, 3, (2, 4, 5))
    labels[0, :2] = 255
    total, right, valid = 0.0, 0, 0
    for n, y, x in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(5)).tolist():
        label = labels[n, y, x].item()
        if label != 255:
            pixel = logits[n, :, y, x]
            total -= (pixel[label] - pixel.exp().sum().log()).item()
            right += pixel.argmax().item() == label
            valid += 1
    assert valid == 30
    want = total / (valid if average == "valid" else 40)
    assert pixel_cross_entropy(logits, labels, 255, average).item() == pytest.approx(want, rel=1e-12)
    assert pixel_accuracy(logits, labels, 255).item() == pytest.approx(100 * right / valid)


@pytest.mark.parametrize("average", ["valid", "all"])
def test_a_batch_of_ignored_labels_has_loss_and_gradient_zero(average):
    net = model(config({**SEGMENTOR, "MODEL.SEM_SEG_HEAD.LOSS_AVERAGE": average})).train()
    inputs = [{**x, "sem_seg": torch.full_like(x["sem_seg"], 255)} for x in labelled()]
    with EventStorage() as storage:
        losses = net(inputs)
    sum(losses.values()).backward()
    assert [loss.item() for loss in losses.values()] == [0, 0]
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())
    assert storage.latest()["sem_seg/accuracy"][0] == 0


def test_every_parameter_learns_and_the_log_has_the_accuracy():
    for base in (SEGMENTOR, PSP, {**SEGMENTOR, "MODEL.SEM_SEG_HEAD.ASPP_FORM": "project"}):
        net = model(config(base)).train()
        with EventStorage() as storage:
            sum(net(labelled()).values()).backward()
        assert all(p.grad.abs().max() > 0 for p in net.parameters())
        assert 0 < storage.latest()["sem_seg/accuracy"][0] < 100 and "sem_seg/accuracy_aux" in storage.latest()


def test_losses_are_float32_in_mixed_precision_and_near_those_without():
    net = model(config({**PSP, "MODEL.SEM_SEG_HEAD.DROPOUT": 0.0})).train()
    want = net(labelled())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = net(labelled())
    for name, loss in want.items():
        assert got[name].dtype == torch.float32
        assert got[name].item() == pytest.approx(loss.item(), rel=0.02)


# --- inference --------------------------------------------------------------------


def windowed(size, stride, batch=3, **changes):
    keys = {"ENABLED": True, "SIZE": list(size), "STRIDE": list(stride), "BATCH": batch}
    return config(SEGMENTOR, **{f"TEST__SLIDING_WINDOW__{key}": value for key, value in keys.items()}, **changes)


@torch.no_grad()
def test_windows_are_those_of_a_loop():
    net = randomized(model(windowed((32, 40), (24, 16))))
    (x,) = labelled(((50, 70),))
    whole = randomized(model(config(SEGMENTOR)))
    total, count = torch.zeros(4, 50, 70), torch.zeros(50, 70)
    for y0 in (0, 18):  # 24 would leave the image
        for x0 in (0, 16, 30):
            part = {"image": x["image"][:, y0 : y0 + 32, x0 : x0 + 40]}
            total[:, y0 : y0 + 32, x0 : x0 + 40] += whole([part])[0]["sem_seg"]
            count[y0 : y0 + 32, x0 : x0 + 40] += 1
    assert (net([x])[0]["sem_seg"] - total / count).abs().max() < 1e-5


def test_windows_cover_every_pixel_and_stay_in_the_image():
    for height, width in ((1, 1), (31, 33), (32, 40), (33, 41), (100, 80)):
        windows = SlidingWindows((32, 40), (32, 13))
        seen = torch.zeros(height, width)
        for y, x in windows.corners(height, width):
            assert 0 <= y <= max(height - 32, 0) and 0 <= x <= max(width - 40, 0)
            seen[y : y + 32, x : x + 40] += 1
        assert seen.min() >= 1


@torch.no_grad()
def test_windows_are_batched_within_bounds():
    net = randomized(model(windowed((32, 32), (16, 16), batch=3)))
    sizes = []
    net.backbone.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    net(labelled(((64, 80),)))
    assert sizes == [3, 3, 3, 3]


@torch.no_grad()
def test_predictions_do_not_depend_on_the_batch_and_have_the_wanted_size():
    net = randomized(model(config(PSP)))
    inputs = [{**x, "height": 30, "width": 41} for x in labelled(((50, 70), (37, 61), (50, 70)))]
    together, alone = net(inputs), [net([x])[0] for x in inputs]
    assert all(torch.equal(a["sem_seg"], b["sem_seg"]) for a, b in zip(together, alone))
    assert {tuple(x["sem_seg"].shape) for x in together} == {(4, 30, 41)}


@torch.no_grad()
def test_the_plain_segmentor_predicts_the_same_where_sides_are_multiples_of_the_stride():
    ours, plain = (
        model(config(SEGMENTOR, MODEL__META_ARCHITECTURE=name)) for name in ("Segmentor", "SemanticSegmentor")
    )
    assert type(plain) is SemanticSegmentor and isinstance(ours, SemanticSegmentor)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    got, want = (randomized(net)(labelled())[1]["sem_seg"] for net in (ours, plain))
    assert (got - want).abs().max() < 1e-5


@torch.no_grad()
def test_semantic_fpn_can_be_predicted_from_windows():
    fpn = {
        "MODEL.META_ARCHITECTURE": "Segmentor",
        "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.OUT_CHANNELS": 8,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 4,
        "MODEL.SEM_SEG_HEAD.NORM": "",
    }
    slides = {"TEST.SLIDING_WINDOW.ENABLED": True, "TEST.SLIDING_WINDOW.SIZE": [50, 50]}
    (x,) = labelled(((50, 70),))
    (whole,), (parts,) = (randomized(model(config({**fpn, **more})))([x]) for more in ({}, slides))
    assert parts["sem_seg"].shape == whole["sem_seg"].shape == (4, 50, 70)
    (left,) = randomized(model(config(fpn)))([{"image": x["image"][:, :, :20]}])
    (first,) = randomized(model(config(fpn)))([{"image": x["image"][:, :, :50]}])
    assert torch.allclose(parts["sem_seg"][:, :, :20], first["sem_seg"][:, :, :20], atol=1e-5)
    assert left["sem_seg"].shape == (4, 50, 20)


@torch.no_grad()
def test_test_augmentation_averages_probabilities_over_scales_and_flips():
    cfg = config(PSP, TEST__AUG__ENABLED=True, TEST__AUG__MIN_SIZES=(48, 64), TEST__AUG__MAX_SIZE=200)
    net = randomized(model(cfg))
    (x,) = labelled(((64, 96),))
    augmented = architecture_of(net).with_test_augmentation(cfg, net)
    got = augmented([x])[0]["sem_seg"]
    versions = augmented.mapper(x)
    assert [tuple(v["image"].shape[1:]) for v in versions] == [(48, 72), (48, 72), (64, 96), (64, 96)]
    want = 0
    for i, version in enumerate(versions):
        logits = net([{"image": version["image"], "height": 64, "width": 96}])[0]["sem_seg"]
        want = want + (logits.flip(-1) if i % 2 else logits).softmax(0) / 4
    assert (got - want).abs().max() < 1e-6 and (got.sum(0) - 1).abs().max() < 1e-5


# --- taps and distillation --------------------------------------------------------


def test_logits_of_both_heads_are_known_and_can_be_tapped_in_evaluation():
    net = model(windowed((32, 32), (16, 16))).eval()
    assert [p.tap for p in architecture_of(net).predictions()] == [MAIN, AUX]
    taps = describe_taps(net, [MAIN, AUX, "res5"])
    assert {name: (tap.channels, tap.stride) for name, tap in taps.items()} == {
        MAIN: (4, 8),
        AUX: (4, 8),
        "res5": (32, 8),
    }
    calls = []
    net.sem_seg_head.auxiliary.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        net(labelled())
    assert not calls and not net._is_tapped  # predictions do not need it
    with torch.no_grad(), FeatureTaps(net, [AUX]).recording() as found:
        net(labelled(((64, 96), (48, 96))))
    assert calls == [1] and found[AUX].shape == (2, 4, 8, 12)


METHODS = {
    "MaskedGenerative": {"DISTILL__MASKED_GENERATIVE__TAPS": ["res5"]},
    "LogitKD": {},
    "FeatureMimic": {"DISTILL__FEATURE_MIMIC__TAPS": ["res4", "res5"]},
}


def test_methods_find_their_maps_and_logits_also_of_a_teacher_with_windows(tmp_path):
    teacher = windowed((32, 32), (16, 16), MODEL__RESNETS__RES2_OUT_CHANNELS=6)
    keys = {key: value for method in METHODS.values() for key, value in method.items()}
    cfg = config(PSP, DISTILL__METHODS=list(METHODS), **keys, **write_teacher(tmp_path, teacher))
    net = build_distilled_model(cfg).train()
    losses = net(labelled(((64, 96), (40, 64))))
    distilled = {name.removeprefix("distill/") for name in losses if name.startswith("distill/")}
    assert distilled == {
        "MaskedGenerative/res5", "FeatureMimic/res4", "FeatureMimic/res5", f"LogitKD/{MAIN}", f"LogitKD/{AUX}",
    }  # fmt: skip
    sum(losses.values()).backward()
    assert all(loss > 0 for loss in losses.values())
    assert net.student.sem_seg_head.auxiliary.predictor.weight.grad.abs().max() > 0


def test_a_student_without_an_auxiliary_head_follows_the_main_one(tmp_path):
    cfg = config(
        SEGMENTOR,
        MODEL__SEM_SEG_HEAD__AUX_FEATURE="",
        DISTILL__METHODS=["LogitKD"],
        **write_teacher(tmp_path, config(SEGMENTOR)),
    )
    pairs = build_distilled_model(cfg).distillers["LogitKD"].pairs
    assert [pair.name for pair in pairs] == [MAIN]


def test_evaluation_mode_of_a_student_is_left_alone(tmp_path):
    net = model(config(SEGMENTOR)).train()
    with evaluation_mode(net):
        describe_taps(net, [AUX])
    assert net.training and not net.sem_seg_head._auxiliary_is_tapped


# --- weights of other libraries ----------------------------------------------------


@pytest.mark.parametrize(
    "name, source, prefix",
    [("backbone_resnet18_v1c", RESNET_V1C, ""), ("maskd_net_pspnet_r18", DEEP_STEM_RESNET, "pretrained.")],
)
def test_weights_of_resnets_with_deep_stems_find_their_places(name, source, prefix):
    weights = {k.removeprefix(prefix): v for k, v in Recording(name).weights().items() if k.startswith(prefix)}
    widths = {"STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 5}
    widths = widths if not prefix else {"STEM_OUT_CHANNELS": 128, "RES2_OUT_CHANNELS": 64}
    cfg = config({**SEGMENTOR, **{f"MODEL.RESNETS.{key}": value for key, value in widths.items()}})
    net = nn.ModuleDict({"backbone": build_backbone(cfg)})
    placed, left = to_detectron2(weights, net.state_dict())
    assert source_of(weights) == source and not left
    counters = {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")}
    net.load_state_dict({**counters, **placed}, strict=True)


@torch.no_grad()
def test_torchvisions_mobilenet_has_the_same_features():
    theirs = randomized(torchvision.models.mobilenet_v2(weights=None))
    ours = nn.ModuleDict({"backbone": MobileNetV2(output_stride=32, out_features=["res2", "res3", "res4", "res5"])})
    assert source_of(theirs.state_dict()) == MOBILENET_V2
    placed, left = to_detectron2(theirs.state_dict(), ours.state_dict())
    assert {name.split(".")[0:2][-1] for name in left} == {"18", "1"}  # the last convolution, the classifier
    ours.load_state_dict(placed, strict=True)
    x = torch.randn(1, 3, 64, 64)
    features = ours.eval()["backbone"](x)
    for name, end in (("res2", 4), ("res3", 7), ("res4", 14), ("res5", 18)):
        assert torch.allclose(features[name], theirs.features[:end](x), atol=1e-5)


# --- what is wrong ------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"SEM_SEG_HEAD__IN_FEATURES": ["res4", "res5"]}, r"MODEL\.SEM_SEG_HEAD\.IN_FEATURES is .*takes one feature"),
        ({"SEM_SEG_HEAD__IN_FEATURES": ["res3"]}, r"MODEL\.SEM_SEG_HEAD\.IN_FEATURES is 'res3'; .*res4, res5"),
        ({"SEM_SEG_HEAD__AUX_FEATURE": "res2"}, r"MODEL\.SEM_SEG_HEAD\.AUX_FEATURE is 'res2'"),
        ({"SEM_SEG_HEAD__ASPP_FORM": "concat"}, r"MODEL\.SEM_SEG_HEAD\.ASPP_FORM is 'concat'; .*project, bottleneck"),
        ({"SEM_SEG_HEAD__LOSS_AVERAGE": "mean"}, r"MODEL\.SEM_SEG_HEAD\.LOSS_AVERAGE"),
        ({"SEM_SEG_HEAD__ASPP_DILATIONS": [0]}, r"MODEL\.SEM_SEG_HEAD\.ASPP_DILATIONS.* at least 1"),
        ({"SEM_SEG_HEAD__DROPOUT": 1.0}, r"MODEL\.SEM_SEG_HEAD\.DROPOUT.* below 1"),
        ({"RESNETS__RES5_DILATION": 2}, r"MODEL\.RESNETS\.RES5_DILATION is 2; it must be 4 with RES4_DILATION 2"),
        ({"RESNETS__STEM_OUT_CHANNELS": 7}, r"MODEL\.RESNETS\.STEM_OUT_CHANNELS is 7; it must be even"),
        ({"RESNETS__NUM_GROUPS": 2}, r"MODEL\.RESNETS\.NUM_GROUPS is 2; it must be 1 with DEPTH 18"),
        ({"RESNETS__DEFORM_ON_PER_STAGE": [False, False, True, True]}, r"MODEL\.RESNETS\.DEFORM_ON_PER_STAGE"),
        ({"BACKBONE__NAME": "build_resnet_backbone"}, r"MODEL\.RESNETS\.(RES5_DILATION|STEM_TYPE)"),
    ],
)  # fmt: skip
def test_wrong_settings_are_told_with_their_key(changes, message):
    cfg = config(SEGMENTOR, **{f"MODEL__{key}": value for key, value in changes.items()})
    with pytest.raises(ConfigError, match=message):
        check_values(cfg)
        model(cfg)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"TEST__SLIDING_WINDOW__STRIDE": [600, 999]}, r"TEST\.SLIDING_WINDOW\.STRIDE is \[600, 999\].*, \[769, 769\]"),
        ({"TEST__SLIDING_WINDOW__SIZE": [769]}, r"TEST\.SLIDING_WINDOW\.SIZE .*2 items"),
        ({"MODEL__META_ARCHITECTURE": "SemanticSegmentor"}, r"TEST\.SLIDING_WINDOW\.ENABLED .* take Segmentor"),
        ({"SOLVER__LR_SCHEDULER_NAME": "WarmupPolyLR", "SOLVER__BASE_LR_END": 1.0}, r"SOLVER\.BASE_LR_END is 1\.0"),
    ],
)  # fmt: skip
def test_windows_and_schedules_that_cannot_be_are_told(changes, message):
    cfg = config(SEGMENTOR, **{"TEST__SLIDING_WINDOW__ENABLED": True, **changes})
    with pytest.raises(ConfigError, match=message):
        check_values(cfg)
