"""RepPoints from YAML: its definitions on cases made by hand, taps, distillation, runs, processes, errors."""

import itertools
import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from fvcore.nn import sigmoid_focal_loss as reference_focal_loss
from helpers import same_tensors
from models import batch, config, model, write_teacher
from runs import ROOT, environment, in_two_processes, read_checkpoint, run_training
from torch import Tensor, nn

from d2kd.engine import load_config
from d2kd.errors import ConfigError
from d2kd.layers import sigmoid_focal_loss
from d2kd.modeling import FeatureTaps, TapError, build_distilled_model, init_from_teacher, num_classes
from d2kd.modeling.backbone.reppoints_fpn import NormedFPN, StridedLevels
from d2kd.modeling.meta_arch.reppoints import (
    BACKGROUND,
    IGNORED,
    MinMaxTransform,
    MomentTransform,
    RepPointsHead,
    assign_by_distance,
    assign_by_overlap,
)
from d2kd.visualization import detection_grid, draw_points
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_backbone
from detectron2.modeling.backbone import BottleneckBlock, DeformBottleneckBlock
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

REPPOINTS = {
    "MODEL.META_ARCHITECTURE": "RepPoints",
    "MODEL.BACKBONE.NAME": "build_reppoints_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.OUT_CHANNELS": 64,
    "MODEL.FPN.NORM": "GN",
    "MODEL.REPPOINTS.NUM_CLASSES": 3,
    "MODEL.REPPOINTS.NUM_CONVS": 1,
    "MODEL.REPPOINTS.CONV_DIM": 64,
    "MODEL.REPPOINTS.POINT_DIM": 64,
}
#: Maps of the neck before their norms, as published for MaskedGenerative.
PRE_NORM = [*(f"fpn_output{level}.pre_norm" for level in (3, 4, 5)), "top_block.p6.pre_norm", "top_block.p7.pre_norm"]
LOSSES = {"loss_cls", "loss_pts_init", "loss_pts_refine"}


def training_losses(net: nn.Module, inputs: list[dict[str, Any]] | None = None) -> dict[str, Tensor]:
    torch.manual_seed(3)
    with EventStorage():
        return net.train()(inputs or batch())


def one_image(boxes: list[list[float]], classes: list[int], side: int = 128) -> list[dict[str, Any]]:
    """A batch of one image with these objects."""
    inputs = batch([(side, side)])
    boxes_tensor = torch.tensor(boxes).reshape(-1, 4)
    inputs[0]["instances"] = Instances(
        (side, side), gt_boxes=Boxes(boxes_tensor), gt_classes=torch.tensor(classes, dtype=torch.int64)
    )
    return inputs


# ---- definitions, against literal loops ----


def literal_assign_by_distance(xy: Tensor, strides: Tensor, boxes: Tensor, scale: float, count: int) -> list[int]:
    owner, held = [BACKGROUND] * len(xy), [math.inf] * len(xy)
    levels = [int(math.log2(s)) for s in strides]
    for number, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        w, h = max(x1 - x0, 1e-6), max(y1 - y0, 1e-6)
        level = int((math.log2(w / scale) + math.log2(h / scale)) / 2)
        level = min(max(level, min(levels)), max(levels))
        cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
        distance = {
            i: math.hypot((x - cx) / w, (y - cy) / h) for i, (x, y) in enumerate(xy.tolist()) if levels[i] == level
        }
        for i in sorted(distance, key=lambda i: (distance[i], i))[:count]:
            if distance[i] < held[i]:
                owner[i], held[i] = number, distance[i]
    return owner


def literal_iou(a: list[float], b: list[float]) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0.0) * max(h, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / max(union, 1e-6)


def literal_assign_by_overlap(candidates: Tensor, boxes: Tensor, low: float, high: float) -> list[int]:
    iou = [[literal_iou(b, c) for c in candidates.tolist()] for b in boxes.tolist()]
    owner = []
    for column in zip(*iou):
        best = max(column)
        owner.append(BACKGROUND if best < low else column.index(best) if best >= high else IGNORED)
    for number, row in enumerate(iou):
        owner = [number if value == max(row) else o for value, o in zip(row, owner)]
    return owner


def grid(strides: tuple[int, ...] = (8, 16, 32), side: int = 64) -> tuple[Tensor, Tensor]:
    xy = [(x, y, s) for s in strides for y in range(0, side, s) for x in range(0, side, s)]
    table = torch.tensor(xy, dtype=torch.double)
    return table[:, :2], table[:, 2]


@pytest.mark.parametrize("seed", range(4))
def test_assigners_are_their_definitions(seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(12, 2, generator=generator, dtype=torch.double) * 60
    sides = torch.rand(12, 2, generator=generator, dtype=torch.double).square() * 60 + 0.5
    boxes = torch.cat([corner, corner + sides], dim=1).mul(2).round().div(2)  # with ties
    boxes = torch.cat([boxes, boxes[:3], torch.tensor([[500.0, 500, 600, 600]], dtype=torch.double)])
    xy, strides = grid()
    for count, scale in itertools.product((1, 2, 5), (4.0, 8.0)):
        found = assign_by_distance(xy, strides, boxes, scale, count)
        assert found.tolist() == literal_assign_by_distance(xy, strides, boxes, scale, count)
    candidates = boxes[torch.randint(len(boxes), (40,), generator=generator)]
    candidates = candidates + torch.randn(40, 4, generator=generator, dtype=torch.double).mul(4).round().sort(1).values
    candidates[:5] = boxes[:5]
    for objects, low, high in ((boxes[:-1], 0.4, 0.5), (boxes[:4], 0.2, 0.3), (boxes, 0.4, 0.5)):
        found = assign_by_overlap(candidates, objects, low, high)
        assert found.tolist() == literal_assign_by_overlap(candidates, objects, low, high)


def test_of_identical_boxes_the_first_has_the_first_points_and_the_last_the_class():
    xy, strides = grid()
    twins = torch.tensor([[8.0, 8, 40, 40], [8, 8, 40, 40]], dtype=torch.double)
    assert set(assign_by_distance(xy, strides, twins).tolist()) == {BACKGROUND, 0}
    candidates = torch.tensor([[8.0, 8, 40, 40], [9, 9, 40, 40]], dtype=torch.double)
    assert assign_by_overlap(candidates, twins).tolist() == [1, 0]


def test_a_box_that_no_candidate_reaches_takes_all_that_no_other_one_does():
    candidates = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    objects = torch.tensor([[50.0, 50, 60, 60], [0, 0, 10, 10]])
    assert assign_by_overlap(candidates, objects).tolist() == [1, 0]


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (-1.0, 0.0), (0.7, 1.5)])
def test_focal_loss_is_the_papers(alpha, gamma):
    logits = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * 4
    labels = torch.randint(4, (50,), generator=torch.Generator().manual_seed(1))
    one_hot = nn.functional.one_hot(labels, 4)[:, :3].float()
    want = reference_focal_loss(logits, one_hot, alpha=alpha, gamma=gamma)
    torch.testing.assert_close(sigmoid_focal_loss(logits, labels, alpha, gamma), want)


def test_focal_loss_of_certain_predictions_has_finite_gradients():
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    sigmoid_focal_loss(logits, torch.tensor([0, 2]), 0.25, 0.5).sum().backward()
    assert logits.grad.isfinite().all() and logits.grad[1, 1] > 0.5


def test_transforms_of_points_by_hand():
    points = torch.tensor([[0.0, 0], [4, 2], [2, 1], [2, 1], [100, 100]])
    assert MinMaxTransform()(points).tolist() == [0, 0, 100, 100]
    assert MinMaxTransform(first=4)(points).tolist() == [0, 0, 4, 2]
    moment = MomentTransform(multiplier=0.5)
    with torch.no_grad():
        moment.log_scale.copy_(torch.tensor([0.0, math.log(3)]))
    box = moment(points[:4])
    deviation = torch.tensor([math.sqrt(8 / 3), 3 * math.sqrt(2 / 3)])
    torch.testing.assert_close(box, torch.cat([points[2] - deviation, points[2] + deviation]))
    box[2:].sum().backward()
    torch.testing.assert_close(moment.log_scale.grad, 0.5 * deviation)


def test_points_in_one_place_have_a_box_without_sides_and_finite_gradients():
    points = torch.ones(2, 9, 2, requires_grad=True)
    boxes = MomentTransform()(points)
    boxes.square().sum().backward()
    assert boxes.tolist() == [[1.0] * 4] * 2 and points.grad.isfinite().all()


def test_initial_weights_are_the_published_ones():
    torch.manual_seed(0)
    net = model(config(REPPOINTS))
    head = net.head
    for conv in (head.cls_subnet[0], head.initial_conv, head.initial_points, head.refined_points):
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert head.cls_score.bias.tolist() == pytest.approx([-math.log(99)] * 3)
    assert head.initial_points.bias.abs().max() == 0 == net.point_transform.log_scale.abs().max()
    for conv in (head.cls_conv, head.refined_conv):
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.05)
    lateral = net.backbone.fpn_lateral4.weight
    assert lateral.abs().max().item() == pytest.approx(math.sqrt(6 / sum(lateral.shape[:2])), rel=0.02)


# ---- the model ----


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return model(config(REPPOINTS, MODEL__REPPOINTS__SCORE_THRESH_TEST=-1.0))


def test_points_of_detections_span_their_boxes_at_every_size(net):
    inputs = batch([(96, 128)])
    with torch.no_grad():
        (plain,) = net.eval()(inputs)
        (large,) = net(
            [{**inputs[0], "height": 192, "width": 512}],
        )
    plain, large = plain["instances"], large["instances"]
    assert plain.pred_points.shape == (len(plain), 9, 2) and len(plain) == 100
    boxes = Boxes(net.point_transform(plain.pred_points))
    boxes.clip((96, 128))
    torch.testing.assert_close(boxes.tensor, plain.pred_boxes.tensor, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(large.pred_points, plain.pred_points * torch.tensor([4.0, 2.0]))
    torch.testing.assert_close(large.pred_boxes.tensor, plain.pred_boxes.tensor * torch.tensor([4.0, 2, 4, 2]))


@pytest.mark.parametrize("inputs", [one_image([], []), [*one_image([], []), *one_image([], [])]], ids=["one", "two"])
def test_images_without_objects_teach_the_background_only(net, inputs):
    net.zero_grad()
    losses = training_losses(net, inputs)
    assert losses["loss_cls"] > 0 == losses["loss_pts_init"] == losses["loss_pts_refine"]
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)
    assert net.head.refined_points.weight.grad.abs().max() == 0 < net.head.cls_score.weight.grad.abs().max()


@pytest.mark.parametrize(
    "boxes, classes",
    [
        ([[20.0, 20, 20.5, 20.25], [50, 50, 51, 51]], [0, 1]),
        ([[20.0, 20, 60, 60]] * 3, [0, 1, 2]),
        ([[-500.0, -500, -400, -400], [0, 0, 128, 128]], [0, 1]),
        ([[0.0, 0, 128, 1]], [2]),
    ],
    ids=["tiny", "identical", "out of reach", "thin"],
)
def test_unusual_objects_are_learned_with_finite_numbers(net, boxes, classes):
    net.zero_grad()
    losses = training_losses(net, one_image(boxes, classes))
    assert losses.keys() == LOSSES and all(loss.isfinite() and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)


def test_padding_of_a_batch_learns_nothing(net):
    """The small image of a batch has labels at the places only that it has alone."""
    small, large = one_image([[8.0, 8, 40, 40]], [1], side=64), one_image([[8.0, 8, 40, 40]], [1], side=128)
    with torch.no_grad():
        images = net.preprocess_image([*small, *large])
        features = [net.backbone(images.tensor)[name] for name in net.head_in_features]
    from d2kd.modeling.meta_arch.reppoints.points import flatten_levels, locations_of

    locations = locations_of(features, net.strides)
    points = flatten_levels(net.head(features).initial)
    truth = [x["instances"] for x in (*small, *large)]
    first, second = net.label_locations(locations, points, images.image_sizes, truth)
    outside = (locations.xy >= 64).any(dim=1)
    assert not second.counts[0, outside].any() and second.counts[1, outside].any()
    assert not first.foreground[0, outside].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_gives_the_same_losses_up_to_rounding(net, dtype):
    want = training_losses(net)
    with torch.autocast("cpu", dtype=dtype):
        found = training_losses(net)
    for name, loss in found.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(want[name].item(), rel=0.05)


def test_deformable_stages_run_in_mixed_precision():
    net = model(config(REPPOINTS, MODEL__RESNETS__DEFORM_ON_PER_STAGE=[False, True, True, True]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = training_losses(net)
    sum(losses.values()).backward()
    assert net.backbone.bottom_up.res5[0].conv2_offset.weight.grad.abs().max() > 0


def test_pictures_of_the_training():
    net = model(config(REPPOINTS, VIS_PERIOD=1, MODEL__REPPOINTS__SCORE_THRESH_TEST=-1.0)).train()
    with EventStorage() as storage:
        net(batch())
    ((name, picture, _),) = storage._vis_data
    assert "ground truth" in name and picture.shape[0] == 3


def test_it_reads_its_keys():
    cfg = config(
        REPPOINTS,
        MODEL__REPPOINTS__TRANSFORM="partial_minmax",
        MODEL__REPPOINTS__NUM_POINTS=25,
        MODEL__REPPOINTS__BASE_SCALE=2.0,
        MODEL__REPPOINTS__LOCATIONS_PER_OBJECT=3,
        MODEL__REPPOINTS__IOU_THRESHOLDS=[0.3, 0.6],
        MODEL__REPPOINTS__GRADIENT_MULTIPLIER=0.5,
        MODEL__REPPOINTS__FOCAL_LOSS_ALPHA=0.3,
        MODEL__REPPOINTS__FOCAL_LOSS_GAMMA=1.0,
        MODEL__REPPOINTS__SMOOTH_L1_BETA=0.0,
        MODEL__REPPOINTS__INITIAL_LOSS_WEIGHT=0.2,
        MODEL__REPPOINTS__REFINED_LOSS_WEIGHT=0.7,
        MODEL__REPPOINTS__PRIOR_PROB=0.5,
        MODEL__REPPOINTS__IN_FEATURES=["p3", "p4", "p5"],
        MODEL__REPPOINTS__NORM="",
        MODEL__REPPOINTS__SCORE_THRESH_TEST=0.5,
        MODEL__REPPOINTS__NMS_THRESH_TEST=0.4,
        MODEL__REPPOINTS__TOPK_CANDIDATES_TEST=7,
        TEST__DETECTIONS_PER_IMAGE=9,
    )
    net = model(cfg)
    assert (net.base_scale, net.locations_per_object, net.iou_thresholds) == (2.0, 3, (0.3, 0.6))
    assert (net.focal_loss_alpha, net.focal_loss_gamma, net.smooth_l1_beta) == (0.3, 1.0, 0.0)
    assert (net.initial_loss_weight, net.refined_loss_weight) == (0.2, 0.7)
    assert (net.test_score_thresh, net.test_nms_thresh, net.test_topk_candidates) == (0.5, 0.4, 7)
    assert (net.max_detections_per_image, net.head_in_features) == (9, ["p3", "p4", "p5"])
    assert net.head.gradient_multiplier == 0.5 and net.head.cls_conv.kernel_size == (5, 5)
    assert net.head.initial_points.out_channels == 50 and net.point_transform.first == 4
    assert net.head.cls_score.bias.abs().max() == 0
    assert not any(isinstance(m, nn.GroupNorm) for m in net.head.modules())
    assert num_classes(cfg) == ("MODEL.REPPOINTS.NUM_CLASSES", 3)
    assert all(loss.isfinite() for loss in training_losses(net).values())


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"MODEL__REPPOINTS__IN_FEATURES": ["p2", "p3"]},
            r"MODEL\.REPPOINTS\.IN_FEATURES names p2.*p3, p4, p5, p6, p7",
        ),
        ({"MODEL__REPPOINTS__IN_FEATURES": ["p3", "p5"]}, r"MODEL\.REPPOINTS\.IN_FEATURES is .*strides \[8, 32\]"),
        ({"MODEL__REPPOINTS__CONV_DIM": 24}, r"MODEL\.REPPOINTS\.NORM is GN.*CONV_DIM is 24"),
        ({"MODEL__FPN__FUSE_TYPE": "avg"}, r"MODEL\.FPN\.FUSE_TYPE is 'avg'"),
    ],
)
def test_values_that_do_not_fit_name_their_key(changes, message):
    with pytest.raises(ConfigError, match=message):
        model(config(REPPOINTS, **changes))


def test_number_of_points_is_a_square():
    with pytest.raises(ValueError, match="num_points is 8"):
        RepPointsHead(in_channels=32, num_classes=1, num_points=8)


# ---- backbone ----


class Stages(Backbone):
    """Stages of odd sizes."""

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {f"res{level}": ShapeSpec(channels=level, stride=2**level) for level in (3, 4, 5)}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"res3": torch.ones(1, 3, 13, 9), "res4": torch.ones(1, 4, 7, 5), "res5": torch.ones(1, 5, 4, 3)}


def test_pyramid_takes_maps_of_odd_sizes():
    neck = NormedFPN(Stages(), ["res3", "res4", "res5"], 64, norm="GN", top_block=StridedLevels(5, 64, "GN", "res5"))
    sizes = [tuple(x.shape[2:]) for x in neck(torch.zeros(1)).values()]
    assert sizes == [(13, 9), (7, 5), (4, 3), (2, 2), (1, 1)]


def test_deformable_stages_of_a_grouped_backbone():
    cfg = config(
        REPPOINTS,
        MODEL__RESNETS__NUM_GROUPS=2,
        MODEL__RESNETS__DEFORM_ON_PER_STAGE=[False, True, True, True],
    )
    bottom_up = build_backbone(cfg).bottom_up
    assert all(isinstance(block, BottleneckBlock) for block in bottom_up.res2)
    for block in itertools.chain(bottom_up.res3, bottom_up.res4, bottom_up.res5):
        assert isinstance(block, DeformBottleneckBlock) and not block.deform_modulated
        assert block.conv2.groups == 2 and block.conv2_offset.out_channels == 18
        assert block.conv2_offset.weight.abs().max() == 0 == block.conv2_offset.bias.abs().max()


# ---- taps and distillation ----


def test_tap_before_a_norm_is_what_the_norm_gets(net):
    with torch.no_grad(), FeatureTaps(net.eval(), [*PRE_NORM, "p3", "p6", "p7"]).recording() as features:
        net(batch())
    for tap, level in ((PRE_NORM[0], "p3"), (PRE_NORM[3], "p6"), (PRE_NORM[4], "p7")):
        block = net.get_submodule(f"backbone.{tap.removesuffix('.pre_norm')}")
        torch.testing.assert_close(block.norm(features[tap]), features[level])
        assert not torch.allclose(features[tap], features[level])
    calls = [f"head.cls_subnet.0.pre_norm@{i}" for i in (0, 4)]
    with torch.no_grad(), FeatureTaps(net, calls).recording() as features:
        net(batch())
    assert [features[name].shape[-1] for name in calls] == [16, 1]
    with torch.no_grad(), FeatureTaps(net, [PRE_NORM[0]]).replacing(lambda name, x: torch.zeros_like(x)):
        with FeatureTaps(net, ["p3"]).recording() as features:
            net(batch())
    assert torch.equal(features["p3"], net.backbone.fpn_output3.norm.bias[:, None, None].expand_as(features["p3"]))


def test_tap_before_a_norm_that_is_not_there_is_an_error(net):
    with pytest.raises(TapError, match=r"'head\.cls_score\.pre_norm'.* needs a convolution with a norm"):
        FeatureTaps(net, ["head.cls_score.pre_norm"])


METHODS = ["LogitKD", "HeadRegression", "FeatureMimic", "MaskedGenerative"]


def distilled(directory: Any, teacher: dict[str, Any] | None = None, **changes: Any) -> Any:
    named = write_teacher(directory, config(REPPOINTS, **(teacher or {})))
    return build_distilled_model(config(REPPOINTS, **named, **changes))


def test_methods_find_its_predictions_and_maps_by_themselves(tmp_path):
    taps = {"DISTILL__MASKED_GENERATIVE__TAPS": PRE_NORM}
    net = distilled(tmp_path, {"MODEL__RESNETS__WIDTH_PER_GROUP": 8}, DISTILL__METHODS=METHODS, **taps)
    losses = training_losses(net)
    levels = range(5)
    points = [f"head.{kind}_points@{i}" for kind in ("refined", "initial") for i in levels]
    found = {m: [n.split("/")[2] for n in losses if n.startswith(f"distill/{m}/")] for m in METHODS}
    assert found == {
        "LogitKD": [f"head.cls_score@{i}" for i in levels],
        "HeadRegression": points,
        "FeatureMimic": found["FeatureMimic"],
        "MaskedGenerative": PRE_NORM,
    }
    assert found["FeatureMimic"][:3] == ["p3", "p4", "p5"]
    sum(losses.values()).backward()
    trained = [p for p in net.student.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_points_of_a_teacher_weigh_as_published(tmp_path):
    weights = [0.2] * 5 + [0.1] * 5
    keys = {"DISTILL__METHODS": ["HeadRegression"], "DISTILL__HEAD_REGRESSION__BETA": 0.11}
    net = distilled(tmp_path, **keys, DISTILL__HEAD_REGRESSION__TAP_WEIGHTS=weights)
    inputs = batch()
    names = [f"head.{kind}_points@{i}" for kind in ("refined", "initial") for i in range(5)]
    maps = []
    for network in (net.student.train(), net.teacher.model):
        with torch.no_grad(), FeatureTaps(network, names).recording() as features, EventStorage():
            network(inputs)
        maps.append(features)
    losses = training_losses(net, inputs)
    for name, weight in zip(names, weights):
        want = weight * nn.functional.smooth_l1_loss(maps[0][name], maps[1][name], beta=0.11)
        assert losses[f"distill/HeadRegression/{name}"].item() == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.parametrize(
    "teacher, method, message",
    [
        ({"MODEL__REPPOINTS__TRANSFORM": "minmax"}, "HeadRegression", r"MODEL\.REPPOINTS\.TRANSFORM"),
        ({"MODEL__REPPOINTS__NUM_POINTS": 25}, "HeadRegression", r"MODEL\.REPPOINTS\.NUM_POINTS"),
        ({"MODEL__META_ARCHITECTURE": "FCOS"}, "HeadRegression", r"make no box_deltas at the same places"),
        (
            {"MODEL__META_ARCHITECTURE": "FCOS", "MODEL__FCOS__NUM_CLASSES": 3},
            "LogitKD",
            r"locations of predictions \(MODEL\.META_ARCHITECTURE\)",
        ),
    ],
    ids=["transform", "points", "FCOS boxes", "FCOS classes"],
)
def test_predictions_of_another_meaning_are_an_error(tmp_path, teacher, method, message):
    with pytest.raises(ValueError, match=message):
        distilled(tmp_path, teacher, DISTILL__METHODS=[method], DISTILL__INIT_FROM_TEACHER__ENABLED=False)


def test_neck_head_and_transform_start_from_the_teachers():
    student, teacher = model(config(REPPOINTS)), model(config(REPPOINTS), seed=7)
    with torch.no_grad():
        teacher.point_transform.log_scale.fill_(0.5)
    report = init_from_teacher(student, teacher)
    assert not report.absent and not report.other_shape
    same = {name for name, x in student.state_dict().items() if torch.equal(x, teacher.state_dict()[name])}
    assert {"point_transform.log_scale", "head.cls_score.weight", "backbone.top_block.p7.norm.weight"} <= same
    assert "backbone.bottom_up.res3.0.conv1.weight" not in same


# ---- runs ----

RUN = {
    **{key.replace(".", "__"): value for key, value in REPPOINTS.items()},
    "MODEL__REPPOINTS__NUM_CLASSES": 10,
    "MODEL__REPPOINTS__SCORE_THRESH_TEST": -1.0,
}


@pytest.fixture
def paths(write_config: Any, tmp_path: Any) -> Any:
    """The YAML of a student with a teacher."""
    named = write_teacher(tmp_path, config({k.replace("__", "."): v for k, v in RUN.items()}))
    return write_config(**RUN, **named, DISTILL__TEACHER__EVAL_FIRST=False, DISTILL__METHODS=METHODS)


def test_a_distilled_run_resumes_bit_equal_and_writes_its_points(paths, tmp_path):
    run_training(paths, OUTPUT_DIR=str(tmp_path / "whole"))
    run_training(paths, OUTPUT_DIR=str(tmp_path / "parts"), stop_at=3)
    run_training(paths, OUTPUT_DIR=str(tmp_path / "parts"), resume=True)
    whole, parts = read_checkpoint(tmp_path / "whole"), read_checkpoint(tmp_path / "parts")
    assert same_tensors(whole["model"], parts["model"])
    written = json.loads((tmp_path / "whole/inference/coco_instances_results.json").read_text())
    for result in written:
        assert ("points" in result) == (result["score"] >= 0.1)
        assert len(result.get("points", [[0, 0]] * 9)) == 9


def _mean_losses(path: str) -> None:
    """Each process sees one image of a batch; the means of their losses and gradients go to a file."""
    net = model(config(REPPOINTS)).train()
    inputs = [*one_image([[8.0, 8, 40, 40], [60, 60, 120, 125], [30, 70, 62, 100]], [0, 1, 2]), *one_image([], [])]
    with EventStorage():
        losses = net([inputs[comm.get_rank()]])
    sum(losses.values()).backward()
    values = {name: loss.detach() for name, loss in losses.items()}
    values |= {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    for value in values.values():
        torch.distributed.all_reduce(value)
        value /= 2
    if comm.is_main_process():
        torch.save(values, path)


def test_two_processes_have_the_losses_and_gradients_of_one(tmp_path):
    """The image without objects counts as one foreground location, as it does in one process."""
    in_two_processes(_mean_losses, tmp_path / "two.pth")
    found = torch.load(tmp_path / "two.pth", weights_only=True)
    net = model(config(REPPOINTS)).train()
    inputs = [*one_image([[8.0, 8, 40, 40], [60, 60, 120, 125], [30, 70, 62, 100]], [0, 1, 2]), *one_image([], [])]
    with EventStorage():
        losses = net(inputs)
    sum(losses.values()).backward()
    # two processes divide by the mean of their sums, one by the sum: half of it, averaged
    for name, loss in losses.items():
        assert found[name].item() == pytest.approx(loss.item(), rel=1e-4), name
    for name, p in net.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-5 * p.grad.abs().max().item() + 1e-8)


def test_overfitting_tells_what_it_found(digits):
    """A few steps are not enough, and the status says so."""
    command = [sys.executable, "benchmarks/overfit.py", "--config", "configs/PhotoDigits/reppoints_student.yaml"]
    command += ["--data", str(digits), "--iterations", "2", "--device", "cpu"]
    run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    assert json.loads(run.stdout)["bbox/AP"] < 90


def test_pictures_show_the_points(digits, forget_datasets):
    from detectron2.data.datasets import register_coco_instances

    register_coco_instances("points", {}, str(digits / "annotations/instances_val.json"), str(digits / "val"))
    (record, *_), names = DatasetCatalog.get("points"), MetadataCatalog.get("points").thing_classes
    detection = {"box": [10.0, 10, 40, 40], "label": 0, "score": 0.9}
    plain = detection_grid([record], names, {"m": {record["image_id"]: [detection]}})
    shown = detection_grid([record], names, {"m": {record["image_id"]: [{**detection, "points": [[50.0, 20.0]]}]}})
    changed = np.argwhere((plain != shown).any(axis=2))
    assert 20 < len(changed) < 100
    image = np.full((40, 40, 3), 255, np.uint8)
    draw_points(image, np.array([[10.0, 30.0], [-50.0, 5.0]]), (0, 200, 0))
    assert image[30, 10].tolist() == [0, 200, 0] and (image[:20] == 255).all()


@pytest.mark.parametrize(
    "name, network, schedule, clip",
    [
        ("reppoints_R50_1x", (50, 1, 64, [False] * 4), (90000, [60000, 80000]), None),
        ("reppoints_R50_2x", (50, 1, 64, [False] * 4), (180000, [120000, 160000]), None),
        ("reppoints_X101", (101, 32, 4, [False, True, True, True]), (180000, [120000, 160000]), None),
        ("reppoints_R50_X101_MaskedGenerative_2x", (50, 1, 64, [False] * 4), (180000, [120000, 160000]), 35.0),
        ("reppoints_R50_X101_ReceptiveTokens_2x", (50, 1, 64, [False] * 4), (180000, [120000, 160000]), None),
    ],
)
def test_recipes_have_the_published_numbers(name, network, schedule, clip):
    cfg = load_config(str(ROOT / f"configs/COCO/{name}.yaml"), [])
    node, resnet, solver = cfg.MODEL.REPPOINTS, cfg.MODEL.RESNETS, cfg.SOLVER
    assert (resnet.DEPTH, resnet.NUM_GROUPS, resnet.WIDTH_PER_GROUP, resnet.DEFORM_ON_PER_STAGE) == network
    assert not resnet.DEFORM_MODULATED and not resnet.STRIDE_IN_1X1 and cfg.MODEL.BACKBONE.FREEZE_AT == 2
    assert (solver.MAX_ITER, list(solver.STEPS)) == schedule
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MOMENTUM, solver.WEIGHT_DECAY) == (16, 0.01, 0.9, 1e-4)
    assert (solver.WARMUP_ITERS, solver.WARMUP_FACTOR, solver.GAMMA) == (500, 0.001, 0.1)
    assert (solver.CLIP_GRADIENTS.CLIP_VALUE if solver.CLIP_GRADIENTS.ENABLED else None) == clip
    assert (list(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP) == (
        [800],
        1333,
        "horizontal",
    )
    assert (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD) == (
        "RGB",
        [123.675, 116.28, 103.53],
        [58.395, 57.12, 57.375],
    )
    assert (node.NUM_CONVS, node.CONV_DIM, node.NUM_POINTS, node.TRANSFORM, node.NORM) == (3, 256, 9, "moment", "GN")
    assert (node.GRADIENT_MULTIPLIER, node.MOMENT_MULTIPLIER, node.BASE_SCALE) == (0.1, 0.01, 4.0)
    assert (node.INITIAL_LOSS_WEIGHT, node.REFINED_LOSS_WEIGHT, node.SMOOTH_L1_BETA) == (0.5, 1.0, 0.11)
    assert (node.FOCAL_LOSS_ALPHA, node.FOCAL_LOSS_GAMMA, list(node.IOU_THRESHOLDS)) == (0.25, 2.0, [0.4, 0.5])
    assert (node.SCORE_THRESH_TEST, node.NMS_THRESH_TEST, cfg.TEST.DETECTIONS_PER_IMAGE) == (0.05, 0.5, 100)
    assert cfg.MODEL.FPN.NORM == "GN" and cfg.MODEL.BACKBONE.NAME == "build_reppoints_resnet_fpn_backbone"
