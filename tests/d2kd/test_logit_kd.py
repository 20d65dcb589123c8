"""LogitKD against recorded values and closed forms, its forms, and its default taps."""

import numpy as np
import pytest
import torch
from helpers import assert_recorded, tap_pair
from models import FASTER_RCNN, RETINANET, batch, config, write_teacher
from torch.nn import functional as F

from d2kd.distillers import AlignmentError, LogitKD, Prediction
from d2kd.distillers.divergence import binary_divergence, softmax_divergence, spatial_divergence
from d2kd.modeling import MethodError, TapError, build_distilled_model
from detectron2.utils.events import EventStorage

SEMANTIC = {
    **FASTER_RCNN,
    "MODEL.META_ARCHITECTURE": "SemanticSegmentor",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 4,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 8,
    "MODEL.SEM_SEG_HEAD.NORM": "BN",
}
#: Strides of (student, teacher) where both taps hold one vector a region or image.
VECTORS = (0.0, 0.0)
DIVERGENCES = {"softmax": softmax_divergence, "sigmoid": binary_divergence, "spatial": spatial_divergence}


#: What a tap of each kind predicts.
DENSE = Prediction("x", "class_logits", "anchor", activation="sigmoid")
REGION = Prediction("x", "class_logits", "region", activation="softmax")
SIGMOID_REGION = Prediction("x", "class_logits", "region", activation="sigmoid", unused_channels=1)
PIXEL = Prediction("x", "class_logits", "pixel", activation="softmax")
IMAGE = Prediction("x", "class_logits", "image", activation="softmax")


def logit_kd(prediction=DENSE, channels=(4, 4), strides=(8.0, 8.0), **arguments):
    """The method for one pair of taps, x; channels and strides are of (student, teacher)."""
    pairs = [tap_pair("x", channels=channels, strides=strides, prediction=prediction)]
    return LogitKD(**{"pairs": pairs, "weight": 1.0, **arguments})


def distilled(directory, base, teacher=None, **changes):
    named = write_teacher(directory, config(base, **(teacher or {})))
    return build_distilled_model(config(base, DISTILL__METHODS=["LogitKD"], **named, **changes)).train()


def step(net, inputs=None):
    with EventStorage():
        losses = net(inputs or batch())
    sum(losses.values()).backward()
    return {name: loss.item() for name, loss in losses.items()}


@pytest.mark.parametrize("dtype, loss_error", [(torch.double, 1e-9), (torch.float, 1e-5)])
def test_spatial_golden(golden, dtype, loss_error):
    recorded = golden("mgd_seg_logit", dtype)
    student = recorded["logit_student"].requires_grad_()
    method = logit_kd(
        PIXEL,
        channels=(19, 19),
        weight=float(recorded["logit_weight"]),
        temperature=float(recorded["temperature"]),
    )
    loss = method({"x": student}, {"x": recorded["logit_teacher"]})["x"]
    loss.backward()
    assert abs(loss.item() / float(recorded["expected_loss_logit"]) - 1) <= loss_error
    assert_recorded(student.grad, recorded["expected_grad_logit_student"])


def test_softmax_golden(golden):
    recorded = golden("matching_loss")
    student = recorded["kd_student"].requires_grad_()
    method = logit_kd(IMAGE, channels=(student.shape[1],) * 2, strides=VECTORS, temperature=float(recorded["kd_T"]))
    loss = method({"x": student}, {"x": recorded["kd_teacher"]})["x"]
    loss.backward()
    np.testing.assert_allclose(loss.item(), recorded["kd_loss"], rtol=2e-5)
    np.testing.assert_allclose(student.grad, recorded["kd_grad_student"], rtol=2e-5, atol=2e-5)


def test_binary_form_is_the_divergence_of_two_class_softmaxes():
    s, t = torch.randn(2, 4, 3, 5, dtype=torch.double), torch.randn(2, 4, 3, 5, dtype=torch.double) + 1
    two = [torch.stack([x, torch.zeros_like(x)], -1).flatten(0, -2) for x in (s, t)]
    want = softmax_divergence(*two, 2.0) * s.numel()
    assert binary_divergence(s, t, 2.0).item() == pytest.approx(want.item())


def test_sigmoid_form_counts_the_teachers_objects_over_all_levels():
    shapes = {"fine": (2, 4, 6, 6), "coarse": (2, 4, 3, 3)}
    pairs = [tap_pair(n, channels=(4, 4), strides=(8.0, 8.0), prediction=DENSE) for n in shapes]
    s, t = ({n: torch.randn(shape) for n, shape in shapes.items()} for _ in range(2))
    objects = sum(x.sigmoid().square().sum() for x in t.values())
    losses = LogitKD(pairs=pairs, weight=2.0)(s, t)
    for name in shapes:
        want = 2 * binary_divergence(s[name], t[name], 1.0) / objects
        assert losses[name].item() == pytest.approx(want.item(), rel=1e-5)
    nothing = {n: x - 30 for n, x in t.items()}
    assert LogitKD(pairs=pairs, weight=1.0)(s, nothing)["fine"] == binary_divergence(s["fine"], nothing["fine"], 1.0)


@pytest.mark.parametrize("form", DIVERGENCES)
def test_divergences_vanish_at_equality_only_and_have_right_gradients(form):
    x, y = (torch.randn(2, 3, 4, 4, dtype=torch.double) for _ in range(2))
    assert DIVERGENCES[form](x, x.clone(), 2.0).item() == pytest.approx(0, abs=1e-12)
    assert DIVERGENCES[form](x, y, 2.0).item() > 1e-3
    assert torch.autograd.gradcheck(lambda s: DIVERGENCES[form](s, y, 2.0), x.requires_grad_())


@pytest.mark.parametrize("prediction", [REGION, SIGMOID_REGION])
def test_no_regions_give_zero_connected_to_the_student(prediction):
    student = torch.zeros(0, 4, requires_grad=True)
    loss = logit_kd(prediction, strides=VECTORS)({"x": student}, {"x": torch.zeros(0, 4)})["x"]
    loss.backward()
    assert loss.item() == 0 and student.grad.shape == (0, 4)


def test_background_of_sigmoid_classifiers_does_not_count():
    s, t = torch.randn(5, 4), torch.randn(5, 4)
    method = logit_kd(SIGMOID_REGION, strides=VECTORS)
    changed = [torch.cat([x[:, :3], x[:, 3:] + 5], dim=1) for x in (s, t)]
    assert method({"x": s}, {"x": t})["x"] == method({"x": changed[0]}, {"x": changed[1]})["x"]


def test_half_precision_is_computed_in_float32():
    s, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    s, t = s.bfloat16(), t.bfloat16()
    assert logit_kd()({"x": s}, {"x": t})["x"].item() == logit_kd()({"x": s.float()}, {"x": t.float()})["x"].item()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(temperature=0.0), r"DISTILL\.LOGIT_KD\.TEMPERATURE\b"),
        (dict(form="hinge"), r"DISTILL\.LOGIT_KD\.FORM\b"),
        (dict(prediction=None), r"DISTILL\.LOGIT_KD\.FORM\b"),
        (dict(weight=-1.0), r"DISTILL\.LOGIT_KD\.WEIGHT\b"),
        (dict(channels=(4, 6)), r"DISTILL\.LOGIT_KD\.TAPS, .* 4 numbers, the teacher 6"),
        (dict(strides=(8.0, 16.0)), r"DISTILL\.LOGIT_KD\.TAPS, .* stride 8, the teacher at stride 16"),
        (dict(prediction=REGION, strides=VECTORS, form="spatial"), r"DISTILL\.LOGIT_KD\.FORM is spatial"),
    ],
)
def test_arguments_out_of_range_name_the_key(change, message):
    with pytest.raises(ValueError, match=message):
        logit_kd(**change)


def test_pixel_logits_of_other_strides_are_resampled():
    method = logit_kd(PIXEL, strides=(4.0, 8.0))
    t = torch.zeros(1, 4, 3, 3)
    assert method({"x": torch.ones(1, 4, 6, 6)}, {"x": t})["x"].item() == pytest.approx(0, abs=1e-6)


def test_dense_detectors_are_compared_level_by_level(tmp_path):
    losses = step(distilled(tmp_path, RETINANET))
    taps = [name for name in losses if name.startswith("distill/")]
    assert taps == [f"distill/LogitKD/head.cls_score@{i}" for i in range(5)]
    assert all(losses[name] > 0 for name in taps)


def test_levels_are_matched_by_the_feature_they_read(tmp_path):
    teacher = {
        "MODEL__RETINANET__IN_FEATURES": ["p4", "p5", "p6", "p7"],
        "MODEL__ANCHOR_GENERATOR__SIZES": [[32], [64], [128], [256]],
    }
    net = distilled(tmp_path, RETINANET, teacher)
    assert [(p.student.name, p.teacher.name) for p in net.distillers["LogitKD"].pairs] == [
        (f"head.cls_score@{i + 1}", f"head.cls_score@{i}") for i in range(4)
    ]


def test_segmentors_are_compared_before_upsampling(tmp_path):
    inputs = [{**x, "sem_seg": torch.randint(0, 4, x["image"].shape[1:])} for x in batch()]
    losses = step(distilled(tmp_path, SEMANTIC), inputs)
    assert losses["distill/LogitKD/sem_seg_head.predictor"] > 0


def test_form_of_the_box_predictor_follows_its_loss(tmp_path):
    sigmoid = {"MODEL__ROI_BOX_HEAD__USE_SIGMOID_CE": True}
    net = distilled(tmp_path, FASTER_RCNN, sigmoid, **sigmoid)
    prediction = net.distillers["LogitKD"].pairs[0].student.prediction
    assert (prediction.location, prediction.activation, prediction.unused_channels) == ("region", "sigmoid", 1)
    step(net)
    with pytest.raises(
        AlignmentError,
        match=r"DISTILL\.LOGIT_KD\.TAPS, .* region sigmoid class_logits, the teacher's region softmax class_logits",
    ):
        distilled(tmp_path, FASTER_RCNN, **sigmoid)


def test_other_classes_are_an_error_that_names_both_keys(tmp_path):
    with pytest.raises(
        MethodError,
        match=r"3 classes \(MODEL\.RETINANET\.NUM_CLASSES\), the teacher 5 classes \(MODEL\.RETINANET\.NUM_CLASSES\b",
    ):
        distilled(tmp_path, RETINANET, {"MODEL__RETINANET__NUM_CLASSES": 5}, DISTILL__INIT_FROM_TEACHER__ENABLED=False)


def test_other_anchors_are_an_error(tmp_path):
    with pytest.raises(AlignmentError, match=r"MODEL\.ANCHOR_GENERATOR\.SIZES\b"):
        distilled(tmp_path, RETINANET, {"MODEL__ANCHOR_GENERATOR__SIZES": [[20], [40], [80], [160], [320]]})


def test_models_without_a_common_prediction_are_an_error(tmp_path):
    named = write_teacher(tmp_path, config(FASTER_RCNN))
    with pytest.raises(
        TapError, match=r"DISTILL\.LOGIT_KD\.TAPS is empty, .* RetinaNet and a GeneralizedRCNN make no class_logits"
    ):
        build_distilled_model(config(DISTILL__METHODS=["LogitKD"], **named))


def test_softmax_over_pixels_matches_rows():
    s, t = torch.randn(2, 5, 3, 3), torch.randn(2, 5, 3, 3)
    rows = [x.permute(0, 2, 3, 1).reshape(-1, 5) for x in (s, t)]
    want = F.kl_div(rows[0].log_softmax(1), rows[1].softmax(1), reduction="batchmean")
    assert logit_kd(PIXEL, channels=(5, 5), form="softmax")({"x": s}, {"x": t})["x"].item() == pytest.approx(
        want.item(), rel=1e-5
    )
