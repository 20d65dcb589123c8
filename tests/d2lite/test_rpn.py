"""The region proposal network: labels, losses, and the filtering of proposals."""

import pytest
import torch

from d2lite.config import get_cfg
from d2lite.layers import ShapeSpec
from d2lite.modeling import build_proposal_generator
from d2lite.modeling.box_regression import Box2BoxTransform
from d2lite.modeling.proposal_generator import RPN, StandardRPNHead
from d2lite.modeling.proposal_generator.proposal_utils import (
    add_ground_truth_to_proposals,
    find_top_rpn_proposals,
)
from d2lite.structures import Boxes, ImageList, Instances
from d2lite.utils.events import EventStorage

SHAPES = {f"p{i}": ShapeSpec(channels=8, stride=2**i) for i in (2, 3, 4)}
SIZES = [(60, 64), (48, 40)]


def rpn_config():
    cfg = get_cfg()
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [48]]
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 32
    return cfg


def make_rpn(cfg=None) -> RPN:
    torch.manual_seed(0)
    return build_proposal_generator(cfg or rpn_config(), SHAPES)


def inputs():
    generator = torch.Generator().manual_seed(1)
    features = {
        name: torch.randn(2, 8, 64 // s.stride, 64 // s.stride, generator=generator, requires_grad=True)
        for name, s in SHAPES.items()
    }
    return ImageList(torch.zeros(2, 3, 64, 64), SIZES), features


def ground_truth(*boxes_of_images):
    result = []
    for size, boxes in zip(SIZES, boxes_of_images):
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        result.append(Instances(size, gt_boxes=Boxes(boxes), gt_classes=torch.zeros(len(boxes), dtype=torch.int64)))
    return result


@pytest.mark.parametrize("loss_type", ["smooth_l1", "giou", "diou", "ciou"])
@pytest.mark.parametrize(
    "boxes",
    [([], []), ([], [[3, 3, 30, 30]]), ([[7, 9, 8, 10]], [[0, 0, 1, 1]]), ([[0, 0, 64, 60]], [])],
    ids=["no object", "one image without", "one pixel", "whole image"],
)
def test_losses_are_finite_and_reach_every_parameter(boxes, loss_type):
    cfg = rpn_config()
    cfg.MODEL.RPN.BBOX_REG_LOSS_TYPE = loss_type
    rpn = make_rpn(cfg)
    images, features = inputs()
    with EventStorage():
        proposals, losses = rpn(images, features, ground_truth(*boxes))
    sum(losses.values()).backward()
    assert losses.keys() == {"loss_rpn_cls", "loss_rpn_loc"}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rpn.parameters())
    assert (losses["loss_rpn_loc"] == 0) == (boxes == ([], []))
    assert losses["loss_rpn_cls"] > 0
    assert not any(x.proposal_boxes.tensor.requires_grad for x in proposals)


def test_sampled_labels_keep_to_the_batch_size_and_the_fraction():
    cfg = rpn_config()
    cfg.MODEL.RPN.IOU_THRESHOLDS = [0.1, 0.15]  # many positives
    rpn = make_rpn(cfg)
    images, features = inputs()
    anchors = rpn.anchor_generator(list(features.values()))
    labels, matched = rpn.label_and_sample_anchors(anchors, ground_truth([[5, 5, 50, 50]], []))
    assert [(x == 1).sum().item() for x in labels] == [16, 0]
    assert [(x == 0).sum().item() for x in labels] == [16, 32]
    assert torch.equal(matched[0][labels[0] == 1], torch.tensor([[5.0, 5, 50, 50]]).expand(16, 4))
    assert matched[1].shape == matched[0].shape


def test_boundary_threshold_ignores_anchors_that_leave_the_image():
    cfg = rpn_config()
    cfg.MODEL.RPN.BOUNDARY_THRESH = 0
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 10000
    rpn = make_rpn(cfg)
    _, features = inputs()
    anchors = rpn.anchor_generator(list(features.values()))
    labels, _ = rpn.label_and_sample_anchors(anchors, ground_truth([[5, 5, 50, 50]], []))
    for size, image_labels in zip(SIZES, labels):
        inside = Boxes.cat(anchors).inside_box(size)
        assert torch.equal(image_labels >= 0, inside & (image_labels >= 0))
        assert (image_labels >= 0).any() and not inside.all()


def test_loss_weights():
    images, features = inputs()
    gt = ground_truth([[5, 5, 50, 50]], [[3, 3, 30, 30]])
    found = {}
    for weight, box_weight in ((1.0, 1.0), (2.0, 3.0)):
        cfg = rpn_config()
        cfg.MODEL.RPN.LOSS_WEIGHT, cfg.MODEL.RPN.BBOX_REG_LOSS_WEIGHT = weight, box_weight
        rpn = make_rpn(cfg)
        torch.manual_seed(3)
        with EventStorage():
            found[weight] = rpn(images, features, gt)[1]
    assert torch.allclose(found[2.0]["loss_rpn_cls"], 2 * found[1.0]["loss_rpn_cls"])
    assert torch.allclose(found[2.0]["loss_rpn_loc"], 6 * found[1.0]["loss_rpn_loc"])


def test_prediction_is_what_filtering_all_decoded_anchors_gives():
    rpn = make_rpn().eval()
    torch.nn.init.normal_(rpn.rpn_head.anchor_deltas.weight, std=0.2)
    rpn.pre_nms_topk[False], rpn.post_nms_topk[False] = 60, 30
    images, features = inputs()
    proposals, losses = rpn(images, features)
    assert losses == {}

    maps = list(features.values())
    logits, deltas = rpn.rpn_head(maps)
    boxes, scores = [], []
    for anchors, level_logits, level_deltas in zip(rpn.anchor_generator(maps), logits, deltas):
        n, _, h, w = level_logits.shape
        level_deltas = level_deltas.view(n, -1, 4, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, 4)
        transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
        boxes.append(torch.stack([transform.apply_deltas(d, anchors.tensor) for d in level_deltas]))
        scores.append(level_logits.permute(0, 2, 3, 1).reshape(n, -1))
    expected = find_top_rpn_proposals(boxes, scores, SIZES, 0.7, 60, 30, 0.0, False)
    for got, want in zip(proposals, expected):
        assert torch.allclose(got.proposal_boxes.tensor, want.proposal_boxes.tensor)
        assert torch.equal(got.objectness_logits, want.objectness_logits)


def test_proposals_are_sorted_inside_the_image_and_larger_than_the_limit():
    torch.manual_seed(0)
    corners = torch.rand(2, 200, 2) * 80 - 10
    boxes = torch.cat([corners, corners + torch.rand(2, 200, 2) * 20], dim=2)
    results = find_top_rpn_proposals([boxes], [torch.randn(2, 200)], SIZES, 0.7, 150, 40, 5.0, True)
    for size, x in zip(SIZES, results):
        tensor = x.proposal_boxes.tensor
        assert x.image_size == size and 0 < len(x) <= 40
        assert x.proposal_boxes.inside_box((size[0] + 1, size[1] + 1)).all()
        assert (tensor[:, 2:] - tensor[:, :2] > 5).all()
        assert (x.objectness_logits.diff() <= 0).all()


def test_suppression_is_within_a_level_only():
    box = torch.tensor([[[1.0, 1, 20, 20], [1, 1, 20, 21]]])
    score = torch.tensor([[0.5, 0.4]])
    args = ([(50, 50)], 0.7, 10, 10, 0.0, True)
    assert len(find_top_rpn_proposals([box], [score], *args)[0]) == 1
    both = find_top_rpn_proposals([box, box], [score, score - 0.3], *args)[0]
    assert torch.allclose(both.objectness_logits, torch.tensor([0.5, 0.2]))


def test_no_anchor_gives_no_proposal():
    (result,) = find_top_rpn_proposals([torch.zeros(1, 0, 4)], [torch.zeros(1, 0)], [(9, 9)], 0.7, 5, 5, 0.0, True)
    assert len(result) == 0 and result.proposal_boxes.tensor.shape == (0, 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_predictions_stop_training_and_are_dropped_in_inference(value):
    boxes = torch.tensor([[[1.0, 1, 20, 20], [30, 30, 40, 40], [2, 2, 5, 5]]])
    scores = torch.tensor([[0.5, 0.4, 0.3]])
    boxes[0, 0, 2] = value
    args = ([(50, 50)], 0.7, 10, 10, 0.0)
    with pytest.raises(FloatingPointError, match="diverged"):
        find_top_rpn_proposals([boxes], [scores], *args, True)
    (result,) = find_top_rpn_proposals([boxes], [scores], *args, False)
    assert torch.equal(result.objectness_logits, scores[0, 1:])


def test_ground_truth_joins_the_proposals():
    proposals = Instances(SIZES[0])
    proposals.proposal_boxes = Boxes(torch.tensor([[1.0, 2, 3, 4]]))
    proposals.objectness_logits = torch.tensor([0.5])
    (gt, _) = ground_truth([[5, 5, 50, 50]], [])
    for source in (gt, gt.gt_boxes):
        (result,) = add_ground_truth_to_proposals([source], [proposals])
        assert result.get_fields().keys() == {"proposal_boxes", "objectness_logits"}
        assert result.proposal_boxes.tensor.tolist() == [[1, 2, 3, 4], [5, 5, 50, 50]]
        assert result.objectness_logits[1].isfinite() and result.objectness_logits[1].sigmoid() == 1
    assert len(proposals) == 1

    proposals.extra = torch.zeros(1)
    with pytest.raises(AssertionError, match="extra"):
        add_ground_truth_to_proposals([gt], [proposals])
    gt.extra = torch.ones(1)
    assert add_ground_truth_to_proposals([gt], [proposals])[0].extra.tolist() == [0, 1]
    with pytest.raises(ValueError, match="2 images"):
        add_ground_truth_to_proposals([gt], [proposals, proposals])


def test_head_names_its_convolutions_as_checkpoints_do():
    one = StandardRPNHead(in_channels=8, num_anchors=3)
    assert one.conv.weight.shape == (8, 8, 3, 3)
    many = StandardRPNHead(in_channels=8, num_anchors=3, conv_dims=[16, -1, 4])
    shapes = {n: tuple(p.shape) for n, p in many.named_parameters() if n.endswith("weight")}
    assert shapes == {
        "conv.conv0.weight": (16, 8, 3, 3),
        "conv.conv1.weight": (16, 16, 3, 3),
        "conv.conv2.weight": (4, 16, 3, 3),
        "objectness_logits.weight": (3, 4, 1, 1),
        "anchor_deltas.weight": (12, 4, 1, 1),
    }
    with pytest.raises(ValueError, match="CONV_DIMS"):
        StandardRPNHead(in_channels=8, num_anchors=3, conv_dims=[0])


def test_levels_that_cannot_share_a_head_are_an_error():
    shapes = {**SHAPES, "p4": ShapeSpec(channels=9, stride=16)}
    with pytest.raises(ValueError, match=r"RPN.IN_FEATURES.*\[8, 8, 9\]"):
        build_proposal_generator(rpn_config(), shapes)
    cfg = rpn_config()
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32, 40], [48]]
    with pytest.raises(ValueError, match=r"ANCHOR_GENERATOR.*\[3, 6, 3\]"):
        build_proposal_generator(cfg, SHAPES)


def test_other_generators():
    cfg = get_cfg()
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"
    assert build_proposal_generator(cfg, SHAPES) is None
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RRPN"
    with pytest.raises(NotImplementedError, match="RRPN.*Detectron2"):
        build_proposal_generator(cfg, SHAPES)
