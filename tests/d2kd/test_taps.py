"""Taps: what addresses mean, values as they were, hooks gone afterwards."""

import re

import pytest
import torch
from fakes import FakeDetector, images
from models import FASTER_RCNN, batch, config, model
from torch import nn

from d2kd.modeling import build_network
from d2kd.modeling.feature_recording import named_pairs
from d2kd.modeling.taps import (
    FeatureTaps,
    TapError,
    describe_taps,
    pairs_of_methods,
    shared_levels,
    shared_predictions,
    tap_names,
)
from detectron2.utils.events import EventStorage


def record(net, names, train=False, inputs=None, **kwargs):
    net.train(train)
    with EventStorage(), FeatureTaps(net, names).recording(**kwargs) as features:
        net(inputs or batch())
    return features


def hooks(net):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def test_backbone_outputs_and_stages_are_what_the_backbone_returns():
    net = model().eval()
    with torch.no_grad():
        features = record(net, ["p3", "p7", "res4", "res2"])
        x = net.preprocess_image(batch()).tensor
        outputs = net.backbone(x)
        bottom_up = net.backbone.bottom_up(x)
        assert torch.equal(features["p3"], outputs["p3"]) and torch.equal(features["p7"], outputs["p7"])
        assert torch.equal(features["res4"], bottom_up["res4"])
        # res2 is no output of this bottom-up network, but still a stage of it
        body = net.backbone.bottom_up
        assert "res2" not in bottom_up and torch.equal(features["res2"], body.res2(body.stem(x)))


def test_pre_relu_is_the_value_before_the_in_place_relu_and_changes_nothing():
    net = model().eval()
    with torch.no_grad():
        plain = record(net, ["res4", "p3"])
        features = record(net, ["res4.pre_relu", "res4", "p3"])
    assert (features["res4.pre_relu"] < 0).any()
    assert torch.equal(features["res4.pre_relu"].relu(), features["res4"])
    assert torch.equal(features["p3"], plain["p3"])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("tap", ["stem.conv1", "res4.0.conv1", "res4.0.conv1.norm", "res4.0.conv3", "res4.0.shortcut"])
def test_a_layer_of_a_block_gives_what_it_gave_before_the_relu_and_the_sum_in_place(tap, training):
    net = model().train(training)
    with FeatureTaps(net, [tap]).recording(stop_when_done=True) as first:
        net(batch())
    later = record(net, [tap, "p3"], train=training)
    assert torch.equal(first[tap], later[tap]) and (later[tap] < 0).any()
    if training:
        (gradient,) = torch.autograd.grad(later[tap].square().sum(), net.backbone.bottom_up.stem.conv1.weight)
        assert gradient.abs().sum() > 0
        assert torch.equal(later["p3"], record(net, ["p3"], train=True)["p3"])
        with EventStorage(), FeatureTaps(net, [tap]).recording() as features:
            losses = sum(net(batch()).values())
        (gradient,) = torch.autograd.grad(losses, features[tap])  # the task's, as all behind it gets a copy
        assert gradient.abs().sum() > 0


def test_what_is_written_over_elsewhere_is_an_error():
    net = model().eval()
    net.head.cls_subnet[1] = torch.nn.ReLU(inplace=True)
    with pytest.raises(TapError, match=r"'head\.cls_subnet\.0@0': the layers behind the Conv2d write over its output"):
        record(net, ["head.cls_subnet.0@0"])
    with torch.inference_mode():  # where nothing can be told
        record(net, ["head.cls_subnet.0@0"])


def test_pre_relu_gradient_reaches_the_stage_and_equals_that_of_the_plain_model():
    grads = []
    for taps in (["p3"], ["p3", "res5.pre_relu"]):
        net = model()
        features = record(net, taps, train=True)
        features["p3"].square().sum().backward(retain_graph=True)
        grads.append([p.grad.clone() for p in net.backbone.bottom_up.res4.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    net.zero_grad()
    features["res5.pre_relu"].sum().backward()
    assert net.backbone.bottom_up.res5[-1].conv3.weight.grad.abs().sum() > 0


def test_module_path_and_number_of_the_call():
    features = record(FakeDetector(), ["head@0", "head@1", "backbone.bottom_up.res3.0"], inputs=images())
    assert [features[f"head@{i}"].shape[-1] for i in (0, 1)] == [8, 4]
    assert features["backbone.bottom_up.res3.0"].shape[-1] == 8


def test_a_stage_that_is_no_output_is_a_feature_too():
    net = FakeDetector()
    features = record(net, ["p3", "res2", "res3"], inputs=images())
    assert tap_names(net) == ["p3", "p4", "res3", "res2"] and features["res2"].shape[-1] == 16


def test_firing_twice_without_a_number_is_an_error():
    with pytest.raises(TapError, match="head@0"):
        record(FakeDetector(), ["head"], inputs=images())


def test_never_firing_is_an_error():
    with pytest.raises(TapError, match="did not fire in the forward pass: head@9"):
        record(FakeDetector(), ["head@9"], inputs=images())


@pytest.mark.parametrize("wrong, hint", [("p33", "p3"), ("res3.prerelu", "res3"), ("backbone.convs.p5", "convs.p3")])
def test_unknown_address_names_near_matches(wrong, hint):
    with pytest.raises(TapError, match=f"Did you mean .*{hint}"):
        FeatureTaps(FakeDetector(), [wrong])


def test_hooks_are_removed_also_after_an_error():
    net = FakeDetector()
    record(net, ["p3", "res3.pre_relu"], inputs=images())
    with pytest.raises(RuntimeError, match="stop"):
        with FeatureTaps(net, ["p3", "res3.pre_relu"]).recording():
            raise RuntimeError("stop")
    assert hooks(net) == 0


def test_an_error_inside_a_tapped_block_leaves_relu_as_it_was():
    net = FakeDetector()
    net.backbone.bottom_up.res3[-1].conv.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        record(net, ["res3.pre_relu"], inputs=images())
    x = torch.tensor([-1.0])
    torch.nn.functional.relu_(x)
    assert x.item() == 0 and hooks(net) == 0


def test_what_is_known_of_taps():
    taps = describe_taps(FakeDetector(width=6), ["p4", "res2", "res3.pre_relu"])
    known = {name: (tap.channels, tap.stride) for name, tap in taps.items()}
    assert known == {"p4": (8, 16), "res2": (6, 4), "res3.pre_relu": (6, 8)}


def test_a_replaced_feature_is_what_the_model_goes_on_with():
    net = FakeDetector()
    with FeatureTaps(net, ["res3"]).replacing(lambda name, feature: feature * 0) as before:
        outputs = net(images())
    assert before["res3"].abs().sum() > 0
    bias = net.head(net.backbone.convs["p3"].bias.view(1, -1, 1, 1).expand(2, -1, 8, 8))
    assert torch.allclose(outputs[0], bias, atol=1e-5)


def test_stopping_early_runs_nothing_behind_the_deepest_tap():
    net = model().eval()
    ran = []
    net.backbone.bottom_up.res5.register_forward_hook(lambda *a: ran.append("res5"))
    with torch.no_grad():
        features = record(net, ["res2", "res3"], stop_when_done=True)
    assert set(features) == {"res2", "res3"} and not ran


def test_two_stage_models_and_names():
    net = model(config(FASTER_RCNN)).eval()
    assert tap_names(net)[:5] == ["p2", "p3", "p4", "p5", "p6"] and "res2" in tap_names(net)
    with torch.no_grad():
        assert record(net, ["roi_heads.box_head"])["roi_heads.box_head"].dim() == 2


def test_default_levels_are_shared_not_pooled_and_large_enough():
    dense = FakeDetector({"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128})
    two_stage = FakeDetector({"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}, pooled=True)
    assert shared_levels(dense, dense) == ["p3", "p4", "p5", "p6", "p7"]
    assert shared_levels(two_stage, two_stage) == ["p2", "p3", "p4", "p5"]  # p6 is p5, pooled
    assert shared_levels(dense, two_stage) == ["p3", "p4", "p5"]  # p6 is something else there
    assert shared_levels(dense, dense, image_side=128) == ["p3", "p4", "p5"]
    assert shared_levels(dense, dense, image_side=8) == ["p3", "p4", "p5", "p6", "p7"]  # never none


def test_backbones_without_a_common_output_are_told_with_what_is_compared():
    """Stages that both have are no outputs of both: they are told apart from what is compared by default."""
    options = {"MODEL__RESNETS__OUT_FEATURES": ["res3", "res4"], "MODEL__BACKBONE__NAME": "build_resnet_backbone"}
    student = build_network(config(MODEL__META_ARCHITECTURE="ImageClassifier", **options), "student")
    teacher = model(config())
    text = (
        "he backbones share no output: the student's gives res3, res4, the teacher's p3, p4, p5, p6, p7. Taps of both, "
        "not outputs of both, are res3, res4, res2."
    )
    with pytest.raises(TapError, match=re.escape(f"DISTILL.FEATURE_MIMIC.TAPS is empty, and t{text}")):
        pairs_of_methods(config(), ["FeatureMimic"], student, teacher)
    with pytest.raises(TapError, match=r"T.* the student's gives res3, res4, the teacher's .*Name maps with --taps"):
        named_pairs(student, nn.ModuleDict({"backbone": nn.Identity()}), [])


def test_boxes_of_levels_that_are_too_small_are_no_default():
    def found(net, kind, image_side):
        return [ours for ours, _ in shared_predictions(net, net, kind, image_side)]

    dense, two_stage = model(), model(config(FASTER_RCNN))
    boxes, classes = ([f"head.{layer}@{n}" for n in range(5)] for layer in ("bbox_pred", "cls_score"))
    assert found(dense, "box_deltas", 0) == found(dense, "box_deltas", 8) == boxes
    assert found(dense, "box_deltas", 128) == boxes[:3] and found(dense, "class_logits", 128) == classes
    regions = found(two_stage, "box_deltas", 0)
    assert "roi_heads.box_predictor.bbox_pred" in regions and found(two_stage, "box_deltas", 8) == regions


def test_norms_that_take_turns_are_not_left_in_the_middle_of_one():
    net = model(config(MODEL__RETINANET__NORM="BN")).eval()
    for name, buffer in net.named_buffers():  # other statistics for each level
        if "running_mean" in name and "head" in name:
            buffer.normal_()
    names = ["head.cls_score@0", "head.cls_score@1"]
    with torch.no_grad():
        first, second = (record(net, names, stop_when_done=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in names)
