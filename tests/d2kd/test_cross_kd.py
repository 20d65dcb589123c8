"""CrossKD: the formulas written out, which parameters learn, heads that do not correspond."""

import math

import pytest
import torch
import torch.nn.functional as F
from models import FASTER_RCNN, RETINANET, batch, config, write_teacher

from d2kd.errors import UserError
from d2kd.layers import generalized_iou, soft_label_focal_loss
from d2kd.modeling import build_distilled_model, initialize_student
from d2kd.modeling.taps import FeatureTaps
from detectron2.utils.events import EventStorage

FCOS = {
    **RETINANET,
    "MODEL.META_ARCHITECTURE": "FCOS",
    "MODEL.FCOS.NUM_CLASSES": 3,
    "MODEL.FCOS.NUM_CONVS": 2,
    "MODEL.FCOS.NORM": "BN",
}
CASCADE = {
    **FASTER_RCNN,
    "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": [0.5, 0.6, 0.7],
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
}
SMALL = [(64, 64)]


def distilled(tmp_path, base, teacher=None, seed=7, **changes):
    """A model that learns by CrossKD; `teacher` are changes of its teacher's keys."""
    named = write_teacher(tmp_path, config({**base, **(teacher or {})}), seed)
    torch.manual_seed(0)
    return build_distilled_model(config(base, DISTILL__METHODS=["CrossKD"], **changes, **named)).train()


def losses_of(net, images=SMALL):
    with EventStorage():
        losses = net(batch(images))
    return {name.removeprefix("distill/CrossKD/"): x for name, x in losses.items() if name.startswith("distill/")}


def features_of(model, names, images=SMALL):
    taps = FeatureTaps(model, names)
    with torch.no_grad(), EventStorage(), taps.recording() as features:
        model(batch(images))
    return features


def giou(a, b):
    """Of two boxes, number by number (arXiv 1902.09630, algorithm 1)."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inner = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return inner / union - (hull - union) / hull


def decoded(deltas, anchor=(30.0, 50.0, 20.0, 80.0), weights=(1, 1, 1, 1)):
    """The box of deltas (dx, dy, dw, dh) of an anchor of (center x, center y, width, height)."""
    x, y, w, h = anchor
    dx, dy, dw, dh = (d / weight for d, weight in zip(deltas, weights))
    x, y, w, h = x + dx * w, y + dy * h, w * math.exp(dw), h * math.exp(dh)
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("box_loss", ["giou", "l1"])
def test_losses_of_a_dense_head_are_the_formulas(tmp_path, box_loss):
    keys = {f"DISTILL__CROSS_KD__{k}": v for k, v in dict(POWER=2.0, BOX_WEIGHT=3.0, BOX_LOSS=box_loss).items()}
    deep = {"MODEL.RETINANET.NUM_CONVS": 3, "MODEL.FPN.OUT_CHANNELS": 12}
    net = distilled(tmp_path, {**RETINANET, "MODEL.RETINANET.NUM_CONVS": 2}, deep, **keys)
    head, method = net.teacher.model.head, net.distillers["CrossKD"]
    with torch.no_grad():  # an untrained head sees nothing, and is sure of it
        for layer, scale in ((head.cls_score, 8), (head.bbox_pred, 5)):
            layer.weight.mul_(scale)
        head.cls_score.bias.fill_(-0.5)
    ours = features_of(net.student, [p.student.name for p in method.pairs])
    theirs = features_of(net.teacher.model, [p.teacher.name for p in method.pairs])
    assert (
        method.pairs[0].student.name == "head.cls_subnet.1@0" and method.pairs[5].student.name == "head.bbox_subnet.1@0"
    )
    sums, objects = {}, 0.0
    for i in range(5):
        # one layer of the student's two is left, so one of the teacher's three
        aligned = [method.align[k](ours[f"head.{s}_subnet.1@{i}"]) for k, s in ((i, "cls"), (5 + i, "bbox"))]
        p = head.cls_score(F.relu(head.cls_subnet[4](aligned[0])))
        boxes = head.bbox_pred(F.relu(head.bbox_subnet[4](aligned[1])))
        t, target = theirs[f"head.cls_score@{i}"], theirs[f"head.bbox_pred@{i}"]
        scores = boxes_loss = 0.0
        for y in range(t.shape[2]):
            for x in range(t.shape[3]):
                for a in range(3):
                    best = 0.0
                    for k in range(3):
                        pk, tk = (sigmoid(z[0, 3 * a + k, y, x].item()) for z in (p, t))
                        scores += abs(pk - tk) ** 2 * (-tk * math.log(pk) - (1 - tk) * math.log(1 - pk))
                        objects += tk**2
                        best = max(best, tk)
                    two = [z[0, 4 * a : 4 * a + 4, y, x].tolist() for z in (boxes, target)]
                    if box_loss == "giou":
                        boxes_loss += best**2 * (1 - giou(*map(decoded, two)))
                    else:
                        boxes_loss += best**2 * sum(abs(m - n) for m, n in zip(*two))
        sums[f"head.cls_subnet.1@{i}"], sums[f"head.bbox_subnet.1@{i}"] = scores, 3 * boxes_loss
    assert objects > 10
    got = {name: x.item() for name, x in losses_of(net).items()}
    assert got == pytest.approx({name: x / objects for name, x in sums.items()}, rel=2e-4)


@pytest.mark.parametrize(
    "base, frozen",
    [
        (RETINANET, ["head"]),
        ({**FCOS, "MODEL.FCOS.NORM": ""}, ["head"]),
        ({**FASTER_RCNN, "MODEL.ROI_BOX_HEAD.NUM_FC": 2}, ["roi_heads"]),
        (CASCADE, ["roi_heads", "proposal_generator"]),
    ],
)
def test_behind_the_teachers_head_nothing_runs_twice_and_all_is_equal(tmp_path, base, frozen):
    nets = {}
    for name, modules in (("twice", []), ("once", frozen)):
        net = distilled(tmp_path, base, DISTILL__INIT_FROM_TEACHER__FREEZE=modules)
        initialize_student(config(base, DISTILL__INIT_FROM_TEACHER__FREEZE=modules), net)
        torch.manual_seed(3)  # of the regions that are sampled
        losses = list(losses_of(net).values())
        sum(losses).backward()
        gradients = [p.grad for n, p in net.student.named_parameters() if n.startswith("backbone.bottom_up")]
        nets[name] = net, losses, gradients
    (net, losses, gradients), (other, twice, of_twice) = nets["once"], nets["twice"]
    assert losses and torch.allclose(torch.stack(losses), torch.stack(twice), rtol=1e-5, atol=0)
    assert all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max()) for a, b in zip(gradients, of_twice, strict=True)
    )
    assert sum(g.abs().sum() for g in gradients) > 0
    tapped = [(pair.student.name, pair.teacher.name) for pair in net.distillers["CrossKD"].pairs]
    assert all(ours == theirs for ours, theirs in tapped)
    for level in range(len(tapped)):
        maps = torch.ones(1, 4, 2, 2)
        assert net.distillers["CrossKD"].in_teacher_channels(level, maps) is maps
        assert other.distillers["CrossKD"].in_teacher_channels(level, maps) is None


def test_a_part_of_the_head_that_is_trained_runs_on_in_the_teachers(tmp_path):
    base = {**RETINANET, "MODEL.RETINANET.NUM_CONVS": 2}
    net = distilled(tmp_path, base, DISTILL__INIT_FROM_TEACHER__FREEZE=["head.cls_score", "head.bbox_subnet.2"])
    assert {p.student.name.partition("@")[0] for p in net.distillers["CrossKD"].pairs} == {
        "head.cls_subnet.1",
        "head.bbox_subnet.1",
    }
    net = distilled(tmp_path, base, DISTILL__INIT_FROM_TEACHER__FREEZE=["head.cls_score", "head.cls_subnet.2"])
    assert {p.student.name.partition("@")[0] for p in net.distillers["CrossKD"].pairs} == {
        "head.cls_score",
        "head.bbox_subnet.1",
    }


@pytest.mark.parametrize("agnostic", [False, True])
def test_losses_of_a_head_on_regions_are_the_formulas(tmp_path, agnostic):
    base = {**FASTER_RCNN, "MODEL.ROI_BOX_HEAD.NUM_FC": 2, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": agnostic}
    net = distilled(tmp_path, base, {"MODEL.ROI_BOX_HEAD.FC_DIM": 24}, DISTILL__CROSS_KD__POWER=1.5)
    method, heads = net.distillers["CrossKD"], net.teacher.model.roi_heads
    with torch.no_grad():
        heads.box_predictor.cls_score.weight.mul_(30)
        heads.box_predictor.bbox_pred.weight.mul_(30)
    predicted = {}

    def keep(module, args, outputs):
        predicted["all"] = outputs

    seen = net.student.roi_heads.box_head.fc_relu1.register_forward_hook(
        lambda m, a, out: predicted.update(feature=out)
    )
    with seen, heads.box_predictor.register_forward_hook(keep):
        got = {name: x.item() for name, x in losses_of(net).items()}
    with torch.no_grad():
        first, second = (F.relu(heads.box_head.fc2(align(predicted["feature"]))) for align in method.align)
        p, boxes = heads.box_predictor.cls_score(first), heads.box_predictor.bbox_pred(second)
    t, target = predicted["all"]
    scores = boxes_loss = weights = 0.0
    for r in range(len(p)):
        probabilities = [[math.exp(z) / sum(map(math.exp, row)) for z in row] for row in (p[r].tolist(), t[r].tolist())]
        far = sum(abs(a - b) for a, b in zip(*probabilities)) / 2
        scores += far**1.5 * sum(-b * math.log(a) for a, b in zip(*probabilities))
        best = max(range(3), key=lambda k: probabilities[1][k])  # the last one is the background
        weight, first = probabilities[1][best] ** 2, 0 if agnostic else 4 * best
        two = [z[r, first : first + 4].tolist() for z in (boxes, target)]
        boxes_loss += weight * (1 - giou(*(decoded(d, weights=(10, 10, 5, 5)) for d in two)))
        weights += weight
    assert len(p) > 5 and weights > 1
    want = {"roi_heads.box_head.fc_relu1": scores / len(p), "roi_heads.box_head.fc_relu1@0": boxes_loss / weights}
    assert got == pytest.approx(want, rel=2e-4)


@pytest.mark.parametrize("base", [RETINANET, FCOS, FASTER_RCNN, CASCADE], ids=["RetinaNet", "FCOS", "R-CNN", "Cascade"])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(tmp_path, base):
    net = distilled(tmp_path, base)
    for name, p in net.teacher.model.named_parameters():
        if base is FCOS and name == "head.bbox_pred.bias":
            p.fill_(1.0)  # distances below 0 are boxes without area
    net.student.load_state_dict(net.teacher.model.state_dict())
    net.eval().distillers.train()
    for module in (net, net.student):  # losses are computed in training only, and batch norms keep to their averages
        module.training = True
    for part in (net.student.backbone, getattr(net.student, "head", net.student.backbone)):
        part.eval()
    losses = losses_of(net)
    assert losses and all(0 <= loss.item() < 1e-5 for loss in losses.values())
    with torch.no_grad():
        for p in net.student.parameters():
            p.add_(0.02 * torch.randn_like(p))
    assert sum(losses_of(net).values()).item() > 1e-4


@pytest.mark.parametrize("base", [RETINANET, FCOS, CASCADE], ids=["RetinaNet", "FCOS", "Cascade"])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_predictors_learn_the_task_alone_and_the_teacher_nothing(tmp_path, base, precision):
    net = distilled(tmp_path, base, {"MODEL.FPN.OUT_CHANNELS": 16})
    with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
        losses = losses_of(net, [(64, 64), (96, 64)])
    sum(losses.values()).backward()
    assert all(x.isfinite() for x in losses.values()) and sum(losses.values()) > 0
    assert all(p.grad is None for p in net.teacher.model.parameters())
    learned = {name for name, p in net.student.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("backbone.bottom_up" in name for name in learned)
    assert any(name.startswith(("head.cls_subnet.0", "roi_heads.box_head.0.fc1")) for name in learned)
    assert not any("cls_score" in name or "bbox_pred" in name or "box_predictor" in name for name in learned)
    assert not any(name.startswith("teacher") for name in net.state_dict())


def test_other_classes_and_anchors_of_the_teacher_do_not_matter(tmp_path):
    teacher = {"MODEL.RETINANET.NUM_CLASSES": 5, "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0]]}
    net = distilled(tmp_path, RETINANET, teacher, DISTILL__INIT_FROM_TEACHER__ENABLED=False)
    assert all(loss.isfinite() for loss in losses_of(net, [(96, 64), (64, 128)]).values())


def test_with_weight_zero_the_student_learns_nothing_of_it(tmp_path):
    losses = losses_of(distilled(tmp_path, RETINANET, {"MODEL.FPN.OUT_CHANNELS": 16}, DISTILL__CROSS_KD__WEIGHT=0.0))
    assert all(loss.item() == 0 for loss in losses.values())
    net = distilled(tmp_path, RETINANET, {"MODEL.FPN.OUT_CHANNELS": 16}, DISTILL__CROSS_KD__WEIGHT=0.0)
    sum(losses_of(net).values()).backward()
    assert all(p.grad is None for p in net.student.parameters())


R50, FEW = "DISTILL__CROSS_KD__", {"MODEL.RETINANET.IN_FEATURES": ["p3", "p4", "p5"]}
WRONG = {
    "POSITION is 2, and the student's head has 1 layers before its predictor of classes": (
        RETINANET,
        {},
        {"POSITION": 2},
    ),
    "TEACHER_POSITION is 3, and the teacher's head has 1 layers": (RETINANET, {}, {"TEACHER_POSITION": 3}),
    "POSITION is 0, and the student's head has 1 layers": (RETINANET, {}, {"POSITION": 0}),
    "do not correspond: the student's predicts classes on p3, .*p7, boxes on p3.*; the teacher's .*on p5, boxes "
    "on p3.*IN_FEATURES": (
        RETINANET,
        {**FEW, "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [64]]},
        {},
    ),
    "do not correspond: the student's predicts classes on p3.*; the teacher's classes on stage 0 of regions": (
        RETINANET,
        FASTER_RCNN,
        {},
    ),
    "fc_relu1 of the student gives vectors, and the teacher's layers behind .*box_head.conv1 take maps of 3x3 cells": (
        FASTER_RCNN,
        {"MODEL.ROI_BOX_HEAD.NUM_CONV": 2},
        {"TEACHER_POSITION": 1},
    ),
    "TAPS is .*set it to": (RETINANET, {}, {"TAPS": ["p3"]}),
}


@pytest.mark.parametrize("words", WRONG)
def test_heads_that_do_not_correspond(tmp_path, words):
    base, teacher, keys = WRONG[words]
    options = {f"DISTILL__CROSS_KD__{key}": value for key, value in keys.items()}
    with pytest.raises(UserError, match=rf"^DISTILL\.CROSS_KD[^\n]*{words}[^\n]*$"):
        distilled(tmp_path, base, teacher, DISTILL__INIT_FROM_TEACHER__ENABLED=False, **options)


def test_a_model_without_such_a_head(tmp_path):
    base = {"MODEL.META_ARCHITECTURE": "SemanticSegmentor", "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone"}
    base |= {k: FASTER_RCNN[k] for k in FASTER_RCNN if "FPN" in k or "RESNETS" in k}
    base |= {"MODEL.SEM_SEG_HEAD.NUM_CLASSES": 3, "MODEL.SEM_SEG_HEAD.NORM": ""}
    with pytest.raises(UserError, match=r"the student, a SemanticSegmentor, has no head whose layers d2kd knows"):
        distilled(tmp_path, base)


def test_overlaps_of_boxes_without_area_are_no_nan():
    a = torch.tensor([[0.0, 0, 2, 2], [1, 1, 1, 1]], requires_grad=True)
    value = generalized_iou(a, torch.tensor([[1.0, 1, 3, 4], [1, 1, 1, 1]]))
    assert value.tolist() == pytest.approx([giou((0, 0, 2, 2), (1, 1, 3, 4)), 0.0])
    value.sum().backward()
    assert a.grad.isfinite().all()


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("power", [0.0, 0.5, 2.0])
def test_equal_scores_have_a_finite_slope(softmax, power):
    x = torch.randn(4, 3, requires_grad=True)
    equal = x.detach().softmax(1) if softmax else x.detach().sigmoid()
    soft_label_focal_loss(x, equal, power, softmax).backward()
    assert x.grad.isfinite().all()
    assert soft_label_focal_loss(x[:0], equal[:0], power, softmax).item() == 0


@pytest.mark.parametrize("power", [0.0, 0.7, 1.0, 2.0])
def test_the_gradient_of_binary_scores_is_that_of_the_formula(power):
    generator = torch.Generator().manual_seed(0)
    x, target = (3 * torch.randn(5, 4, 2, 2, dtype=torch.double, generator=generator) for _ in range(2))
    target = target.sigmoid()
    assert torch.autograd.gradcheck(lambda x: soft_label_focal_loss(x, target, power), x.requires_grad_())
    p = x.sigmoid()
    plain = ((p - target).abs() ** power * F.binary_cross_entropy(p, target, reduction="none")).sum()
    assert soft_label_focal_loss(x, target, power).item() == pytest.approx(plain.item(), rel=1e-9)
