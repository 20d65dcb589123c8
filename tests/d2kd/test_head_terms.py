"""HeadRegression, and the predictions of a teacher's box head on the regions that a student sampled."""

import pytest
import torch
from helpers import same_tensors, tap_pair
from models import FASTER_RCNN, RETINANET, batch, config, model, write_teacher
from torch.nn import functional as F

from d2kd.distillers import AlignmentError, HeadRegression
from d2kd.errors import ConfigError
from d2kd.modeling import TapError, Teacher, build_distilled_model
from d2kd.modeling.teacher_passes import RegionPass
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

AGNOSTIC = {"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}
CASCADE = {**FASTER_RCNN, **AGNOSTIC, "MODEL.ROI_HEADS.NAME": "CascadeROIHeads"}
C4 = {
    **FASTER_RCNN,
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res4"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16, 64]],
    "MODEL.RPN.IN_FEATURES": ["res4"],
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["res4"],
}
BOTH = ["HeadRegression", "LogitKD"]


def head_regression(strides=(8.0,), weight=1.0, **arguments):
    """The method for four deltas at every stride, at taps x0, x1, ..."""
    pairs = [tap_pair(f"x{i}", channels=(4, 4), strides=(s, s)) for i, s in enumerate(strides)]
    return HeadRegression(pairs=pairs, weight=weight, **arguments)


def distilled(directory, base, teacher_base=None, methods=BOTH, teacher=None, **changes):
    named = write_teacher(directory, config(teacher_base or base, **(teacher or {})))
    return build_distilled_model(config(base, DISTILL__METHODS=methods, **named, **changes)).train()


def step(net, inputs=None):
    with EventStorage():
        losses = net(inputs or batch())
    sum(losses.values()).backward()
    return losses


def test_golden_of_dense_heads(golden):
    recorded = golden("maskd_stage2_e2e", torch.double)
    levels = range(int(recorded["num_levels"]))
    deltas = {
        who: [
            F.conv2d(recorded[f"{who}_{i}"], recorded[f"head_{who}_weight"], recorded[f"head_{who}_bias"])
            for i in levels
        ]
        for who in ("student", "teacher")
    }
    method = head_regression([8.0] * len(levels), float(recorded["head_weight"]), beta=float(recorded["head_beta"]))
    student = {f"x{i}": x.requires_grad_() for i, x in enumerate(deltas["student"])}
    losses = method(student, {f"x{i}": x for i, x in enumerate(deltas["teacher"])})
    for i in levels:
        assert losses[f"x{i}"].item() == pytest.approx(recorded["expected_head_loss_per_level"][i].item(), rel=1e-9)
        losses[f"x{i}"].backward()
        difference = deltas["student"][i].detach() - deltas["teacher"][i]
        want = recorded["head_weight"] * (difference / recorded["head_beta"]).clamp(-1, 1) / difference.numel()
        torch.testing.assert_close(student[f"x{i}"].grad, want)


def test_beta_zero_is_plain_l1_and_taps_have_factors():
    s, t = {n: torch.randn(2, 4, 3, 3) for n in ("x0", "x1")}, {n: torch.randn(2, 4, 3, 3) for n in ("x0", "x1")}
    losses = head_regression([8.0] * 2, beta=0.0, tap_weights=[0.2, 3.0])(s, t)
    for name, factor in (("x0", 0.2), ("x1", 3.0)):
        assert losses[name].item() == pytest.approx(factor * (s[name] - t[name]).abs().mean().item())


def test_no_regions_give_zero_connected_to_the_student():
    student = torch.zeros(0, 4, requires_grad=True)
    loss = head_regression([0.0])({"x0": student}, {"x0": torch.zeros(0, 4)})["x0"]
    loss.backward()
    assert loss.item() == 0 and student.grad.shape == (0, 4)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(beta=-1.0), r"DISTILL\.HEAD_REGRESSION\.BETA\b"),
        (dict(tap_weights=[1.0, 2.0]), r"DISTILL\.HEAD_REGRESSION\.TAP_WEIGHTS has 2 numbers for 1"),
        (dict(tap_weights=[-1.0]), r"DISTILL\.HEAD_REGRESSION\.TAP_WEIGHTS\[0\] is -1\.0"),
    ],
)
def test_arguments_out_of_range_name_the_key(change, message):
    with pytest.raises(ValueError, match=message):
        head_regression(**change)


def test_teacher_sees_the_students_regions_without_a_second_backbone_pass(tmp_path):
    net = distilled(tmp_path, FASTER_RCNN)
    calls, teacher = {"backbone": 0, "rpn": 0}, net.teacher.model
    teacher.backbone.register_forward_hook(lambda *_: calls.update(backbone=calls["backbone"] + 1))
    teacher.proposal_generator.register_forward_hook(lambda *_: calls.update(rpn=calls["rpn"] + 1))
    losses = step(net)
    assert calls == {"backbone": 1, "rpn": 0}
    names = [
        "distill/HeadRegression/roi_heads.box_predictor.bbox_pred",
        "distill/LogitKD/roi_heads.box_predictor.cls_score",
    ]
    assert [n for n in losses if n.startswith("distill/")] == names
    assert all(losses[n].item() > 0 for n in names)


def test_rows_of_teacher_and_student_are_the_same_regions(tmp_path):
    """A teacher with the student's own weights and statistics predicts the very same on its regions."""
    cfg = config(FASTER_RCNN, MODEL__RESNETS__NORM="FrozenBN")
    net = distilled(
        tmp_path, FASTER_RCNN, teacher={"MODEL__RESNETS__NORM": "FrozenBN"}, MODEL__RESNETS__NORM="FrozenBN"
    )
    net.student.load_state_dict(model(cfg, seed=7).state_dict())
    losses = step(net)
    assert all(loss.item() < 1e-9 for name, loss in losses.items() if name.startswith("distill/"))
    with torch.no_grad():
        net.student.roi_heads.box_predictor.bbox_pred.bias += 2
    assert step(net)["distill/HeadRegression/roi_heads.box_predictor.bbox_pred"].item() == pytest.approx(1.5, rel=1e-4)


@pytest.mark.parametrize(
    "student, teacher, stages",
    [
        (CASCADE, CASCADE, 3),
        ({**FASTER_RCNN, **AGNOSTIC}, CASCADE, 1),
        (CASCADE, {**FASTER_RCNN, **AGNOSTIC}, 1),
        (C4, C4, 1),
        (C4, FASTER_RCNN, 1),
    ],
    ids=["cascades", "cascade teacher", "cascade student", "C4", "C4 of FPN"],
)
def test_two_stage_families(tmp_path, student, teacher, stages):
    losses = step(distilled(tmp_path, student, teacher))
    named = {n: x.item() for n, x in losses.items() if n.startswith("distill/")}
    assert len(named) == 2 * stages and all(x > 0 for x in named.values())


def test_each_cascade_stage_is_compared_on_the_students_regions_of_that_stage(tmp_path):
    net = distilled(tmp_path, CASCADE)
    got, pooled = [], []
    net.teacher.model.roi_heads.box_pooler.register_forward_pre_hook(lambda _, args: got.append(args[1]))
    net.student.roi_heads.box_pooler.register_forward_pre_hook(lambda _, args: pooled.append(args[1]))
    step(net)
    assert len(pooled) == 3 and len(got) == 3
    assert all(torch.equal(a.tensor, b.tensor) for x, y in zip(got, pooled) for a, b in zip(x, y))


def test_dense_heads_level_by_level(tmp_path):
    losses = step(distilled(tmp_path, RETINANET))
    names = [n for n in losses if n.startswith("distill/HeadRegression/")]
    assert names == [f"distill/HeadRegression/head.bbox_pred@{i}" for i in range(5)]
    assert all(losses[n].item() > 0 for n in names)


def test_batch_without_any_region_trains_on(tmp_path):
    """No proposals and no ground truth: all terms are zero, and every parameter of the box head has a gradient."""
    net = distilled(tmp_path, FASTER_RCNN)
    inputs = [{**x, "instances": x["instances"][:0]} for x in batch()]
    net.student.roi_heads.batch_size_per_image = 0
    losses = step(net, inputs)
    assert all(x.item() == 0 for n, x in losses.items() if n.startswith("distill/"))
    assert all(p.grad is not None for p in net.student.roi_heads.parameters())


@pytest.mark.parametrize("base", [RETINANET, FASTER_RCNN, CASCADE], ids=["RetinaNet", "FasterRCNN", "Cascade"])
def test_weight_zero_gives_bit_equal_student_gradients(tmp_path, base):
    named = write_teacher(tmp_path, config(base))
    off = {f"DISTILL__{m}__WEIGHT": 0.0 for m in ("HEAD_REGRESSION", "LOGIT_KD")}
    cfg = config(base, DISTILL__METHODS=BOTH, **named, **off)
    gradients = []
    for build in (build_model, build_distilled_model):
        torch.manual_seed(3)
        net = build(cfg).train()
        step(net)
        gradients.append({n: p.grad for n, p in getattr(net, "student", net).named_parameters()})
    assert same_tensors(*gradients)


def test_other_class_agnostic_setting_is_an_error(tmp_path):
    with pytest.raises(AlignmentError, match=r"MODEL\.ROI_BOX_HEAD\.CLS_AGNOSTIC_BBOX_REG\b.*False and True"):
        distilled(tmp_path, FASTER_RCNN, CASCADE, ["HeadRegression"])


@pytest.mark.parametrize(
    "base, key, message",
    [
        (FASTER_RCNN, "MODEL__ROI_BOX_HEAD__BBOX_REG_WEIGHTS", r"MODEL\.ROI_BOX_HEAD\.BBOX_REG_WEIGHTS\b"),
        (RETINANET, "MODEL__RETINANET__BBOX_REG_WEIGHTS", r"\bBBOX_REG_WEIGHTS\b"),
    ],
)
def test_other_regression_weights_are_an_error(tmp_path, base, key, message):
    with pytest.raises(AlignmentError, match=message):
        distilled(tmp_path, base, methods=["HeadRegression"], teacher={key: (2.0, 2.0, 2.0, 2.0)})


def test_feature_methods_refuse_vectors(tmp_path):
    taps = ["roi_heads.box_predictor.cls_score"]
    with pytest.raises(AlignmentError, match=r"DISTILL\.FEATURE_MIMIC\.TAPS, roi_heads.*maps"):
        distilled(tmp_path, FASTER_RCNN, methods=["FeatureMimic"], DISTILL__FEATURE_MIMIC__TAPS=taps)


def test_teachers_box_head_needs_regions_of_the_student(tmp_path):
    change = dict(DISTILL__LOGIT_KD__TAPS=["p2"], DISTILL__LOGIT_KD__TEACHER_TAPS=["roi_heads.box_predictor.cls_score"])
    with pytest.raises(ValueError, match="p2"):
        distilled(tmp_path, FASTER_RCNN, methods=["LogitKD"], **change)


def test_one_teacher_stage_for_two_student_stages_is_an_error():
    tap = "roi_heads.box_predictor.bbox_pred"
    student, teacher = model(config(CASCADE)), Teacher(model(config(FASTER_RCNN)))
    with pytest.raises(TapError, match="several stages"):
        RegionPass(student, teacher, [(0, tap), (1, tap)])


def test_hooks_are_gone_afterwards_also_after_an_error():
    net = model(config(FASTER_RCNN))
    steered = RegionPass(net, Teacher(model(config(FASTER_RCNN))), [(0, "roi_heads.box_predictor.bbox_pred")])
    with pytest.raises(RuntimeError), steered.watch():
        raise RuntimeError
    assert not net.roi_heads.box_pooler._forward_pre_hooks


def test_region_outputs_of_no_images_boxes():
    net = model(config(FASTER_RCNN)).eval()
    features = {f"p{i}": torch.randn(1, 8, 2 ** (7 - i), 2 ** (7 - i)) for i in range(2, 6)}
    steered = RegionPass(net, Teacher(net), [(0, "roi_heads.box_predictor.bbox_pred")])
    outputs = steered([], [[Boxes(torch.zeros(0, 4))]], features)
    assert outputs.maps["roi_heads.box_predictor.bbox_pred"].shape == (0, 12)


def test_models_without_regions_have_no_stages():
    with pytest.raises(TapError, match="no box head"):
        RegionPass(model(config(FASTER_RCNN)), Teacher(model(config())), [(0, "roi_heads.box_predictor.bbox_pred")])


def test_rows_of_each_models_own_regions_are_not_compared(tmp_path):
    tap = "roi_heads.box_pooler"
    with pytest.raises(AlignmentError, match=rf"{tap}' gives a row per region, and each model has its own"):
        distilled(tmp_path, FASTER_RCNN, methods=["FeatureMimic"], DISTILL__FEATURE_MIMIC__TAPS=[tap])


def test_the_output_of_the_box_head_itself_is_a_tap():
    tap = "roi_heads.box_head"
    steered = RegionPass(model(config(FASTER_RCNN)), Teacher(model(config(FASTER_RCNN))), [(0, tap)])
    assert steered.taps == [tap]


def test_a_dense_pass_gives_no_rows_of_the_students_regions(tmp_path):
    with pytest.raises(ConfigError, match=r"DISTILL\.LOGIT_KD\.TEACHER_PASS is DensePass.*set it to auto"):
        distilled(tmp_path, FASTER_RCNN, methods=["LogitKD"], DISTILL__LOGIT_KD__TEACHER_PASS="DensePass")
