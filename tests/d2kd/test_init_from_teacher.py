"""Inheriting: what is copied, what is not, and what is an error."""

import pytest
import torch
from models import FASTER_RCNN, config, model

from d2kd.modeling.architectures import architecture_of
from d2kd.modeling.classes import Classes, match_classes
from d2kd.modeling.init_from_teacher import InitializationError, init_from_teacher


def changed(net, before):
    return {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}


def matches(ours, theirs):
    """Different numbers of classes, whose names are not known."""
    numbers = {"thing_classes": Classes("A", ours, None)}, {"thing_classes": Classes("B", theirs, None)}
    return match_classes(*numbers)


def snapshot(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def test_neck_and_head_are_copied_and_the_body_keeps_its_own():
    student, teacher = model(seed=1), model(seed=2)
    before = snapshot(student)
    report = init_from_teacher(student, teacher)
    assert not report.other_shape and not report.absent
    assert all(torch.equal(student.state_dict()[n], teacher.state_dict()[n]) for n in report.copied)
    assert changed(student, before) <= set(report.copied)
    assert {"backbone.fpn_lateral3.weight", "backbone.top_block.p6.weight"} <= set(report.copied)
    assert "head.cls_score.weight" in report.copied
    assert not any(name.startswith("backbone.bottom_up.") for name in report.copied)


def test_other_widths_are_skipped_and_reported_with_both_shapes():
    student, teacher = model(seed=1), model(config(MODEL__RESNETS__RES2_OUT_CHANNELS=32), seed=2)
    report = init_from_teacher(student, teacher)
    assert ("backbone.fpn_lateral3.weight", (8, 32, 1, 1), (8, 64, 1, 1)) in report.other_shape
    assert "backbone.fpn_lateral3.bias" in report.copied and "head.cls_score.weight" in report.copied


def test_excluded_modules_keep_their_own():
    student = model(seed=1)
    before = snapshot(student)
    init_from_teacher(student, model(seed=2), exclude=["head."])
    assert not any(name.startswith("head.") for name in changed(student, before))
    with pytest.raises(InitializationError, match="heads"):
        init_from_teacher(student, model(seed=2), exclude=["heads"])


def test_layers_of_other_classes_keep_their_own():
    student, teacher = model(seed=1), model(config(MODEL__RETINANET__NUM_CLASSES=5), seed=2)
    before = snapshot(student)
    report = init_from_teacher(student, teacher, classes=matches(3, 5))
    assert set(report.by_class) == {"head.cls_score.weight", "head.cls_score.bias"}
    assert not any(name.startswith("head.cls_score") for name in changed(student, before))
    assert not init_from_teacher(student, teacher, exclude=["head.cls_score"], classes=matches(3, 5)).by_class


def test_layers_of_another_width_are_no_predictors_of_other_classes():
    narrow = model(config(MODEL__FPN__OUT_CHANNELS=4, MODEL__RETINANET__NUM_CLASSES=5), seed=2)
    report = init_from_teacher(model(seed=1), narrow, classes=matches(3, 5))
    assert "backbone.fpn_output3.weight" in [name for name, *_ in report.other_shape]
    assert set(report.by_class) == {"head.cls_score.bias"}


def test_another_architecture_shares_what_has_the_same_name():
    student, teacher = model(config(FASTER_RCNN), seed=1), model(seed=2)
    report = init_from_teacher(student, teacher)
    assert any(name.startswith("roi_heads.") for name in report.absent)
    assert "backbone.fpn_output3.weight" in report.copied


def test_the_student_is_not_tied_to_the_teacher():
    student, teacher = model(seed=1), model(seed=2)
    init_from_teacher(student, teacher)
    with torch.no_grad():
        student.head.cls_score.weight.add_(1)
    assert not torch.equal(student.head.cls_score.weight, teacher.head.cls_score.weight)


def test_body_of_models_with_and_without_a_neck():
    assert architecture_of(model()).bottom_up == "backbone.bottom_up"
    plain = config(
        MODEL__BACKBONE__NAME="build_resnet_backbone",
        MODEL__META_ARCHITECTURE="ProposalNetwork",
        MODEL__RESNETS__OUT_FEATURES=["res4"],
        MODEL__ANCHOR_GENERATOR__SIZES=[[32]],
    )
    assert architecture_of(model(plain)).bottom_up == "backbone"
