"""Pooling, sampling of proposals, box, mask and cascade heads."""

import math

import pytest
import torch

from d2lite.config import get_cfg
from d2lite.layers import ROIAlign, ShapeSpec
from d2lite.modeling import build_model, build_roi_heads
from d2lite.modeling.box_regression import Box2BoxTransform
from d2lite.modeling.poolers import ROIPooler, assign_boxes_to_levels
from d2lite.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    select_foreground_proposals,
)
from d2lite.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from d2lite.modeling.roi_heads.mask_head import mask_rcnn_inference
from d2lite.structures import BitMasks, Boxes, ImageList, Instances
from d2lite.utils.events import EventStorage

NUM_CLASSES = 3
SIZES = [(60, 64), (48, 40)]
FPN_SHAPES = {f"p{i}": ShapeSpec(channels=8, stride=2**i) for i in (2, 3, 4)}
C4_SHAPES = {"res4": ShapeSpec(channels=16, stride=16)}


def heads_config(name: str, mask: bool = False):
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = mask
    cfg.MODEL.ROI_HEADS.NAME = name
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = "ROIAlignV2"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    if name == "Res5ROIHeads":
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 4
        cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 1
        cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 6
    else:
        cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4"]
        cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
        cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
        cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 12
        cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 3
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = name == "CascadeROIHeads"
    return cfg


def make_heads(cfg):
    torch.manual_seed(0)
    return build_roi_heads(cfg, C4_SHAPES if cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads" else FPN_SHAPES)


def make_features(heads):
    shapes = C4_SHAPES if heads.in_features == ["res4"] else FPN_SHAPES
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(2, s.channels, 64 // s.stride, 64 // s.stride, generator=generator, requires_grad=True)
        for name, s in shapes.items()
    }


def make_proposals(count: int):
    generator = torch.Generator().manual_seed(2)
    result = []
    for h, w in SIZES:
        corners = torch.rand(count, 2, generator=generator) * torch.tensor([w - 12.0, h - 12.0])
        boxes = torch.cat([corners, corners + 2 + torch.rand(count, 2, generator=generator) * 10], dim=1)
        result.append(Instances((h, w), proposal_boxes=Boxes(boxes), objectness_logits=torch.zeros(count)))
    return result


def make_ground_truth(*boxes_of_images, mask: bool = False):
    result = []
    for size, boxes in zip(SIZES, boxes_of_images):
        x = Instances(size)
        x.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        x.gt_classes = torch.arange(len(boxes)) % NUM_CLASSES
        if mask:
            x.gt_masks = BitMasks(torch.rand(len(boxes), *size) > 0.5)
        result.append(x)
    return result


ALL_HEADS = [
    pytest.param(name, mask, id=f"{name}{' with masks' if mask else ''}")
    for name in ("StandardROIHeads", "CascadeROIHeads", "Res5ROIHeads")
    for mask in (False, True)
]


# ------------------------------------------------------------------------------------------------ pooling


def test_pooler_keeps_the_order_of_the_boxes_and_their_gradients():
    torch.manual_seed(0)
    features = [torch.randn(2, 4, 64 // s, 64 // s, requires_grad=True) for s in (4, 8, 16)]
    sizes = torch.tensor([200.0, 5, 30, 60, 12, 100, 3])
    boxes = torch.stack([torch.zeros(7), torch.ones(7), sizes, sizes * 0.7 + 1], dim=1)
    box_lists = [Boxes(boxes[:4]), Boxes(boxes[4:])]
    pooler = ROIPooler(3, (1 / 4, 1 / 8, 1 / 16), 2, "ROIAlignV2", canonical_box_size=32, canonical_level=3)
    levels = assign_boxes_to_levels(box_lists, 2, 4, 32, 3)
    assert set(levels.tolist()) == {0, 1, 2}
    pooled = pooler(features, box_lists)
    each = []
    for i, (level, box) in enumerate(zip(levels.tolist(), boxes)):
        align = ROIAlign((3, 3), 1 / (4 * 2**level), 2, aligned=True)
        image = torch.tensor([0.0 if i < 4 else 1.0])
        each.append(align(features[level], torch.cat([image, box])[None])[0])
        assert torch.allclose(pooled[i], each[i])
    weights = torch.randn_like(pooled)
    found, wanted = (torch.autograd.grad((x * weights).sum(), features) for x in (pooled, torch.stack(each)))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted))


@pytest.mark.parametrize("kind", ["ROIAlign", "ROIAlignV2", "ROIPool"])
@pytest.mark.parametrize("num_boxes", [0, 1])
def test_pooler_depends_on_every_level(kind, num_boxes):
    features = [torch.randn(2, 4, 32 // s, 32 // s, requires_grad=True) for s in (4, 8)]
    pooler = ROIPooler(3, (1 / 4, 1 / 8), 0, kind)
    boxes = torch.tensor([[1.0, 1, 2, 2]])[:num_boxes]
    pooled = pooler(features, [Boxes(boxes), Boxes(torch.zeros(0, 4))])
    assert pooled.shape == (num_boxes, 4, 3, 3)
    pooled.sum().backward()
    assert all(x.grad is not None for x in features)


def test_pooler_without_images():
    for scales in [(1 / 4,), (1 / 4, 1 / 8)]:
        features = [torch.zeros(0, 4, int(32 * s), int(32 * s)) for s in scales]
        assert ROIPooler((3, 2), scales, 0, "ROIAlignV2")(features, []).shape == (0, 4, 3, 2)


def test_box_without_area_goes_to_the_finest_level():
    assert assign_boxes_to_levels([Boxes(torch.tensor([[3.0, 3, 3, 3]]))], 2, 5, 224, 4).tolist() == [0]


def test_pooler_errors():
    with pytest.raises(ValueError, match="pyramid"):
        ROIPooler(3, (1 / 4, 1 / 16), 0, "ROIAlign")
    with pytest.raises(ValueError, match="pyramid"):
        ROIPooler(3, (1 / 3,), 0, "ROIAlign")
    with pytest.raises(ValueError, match="'RoIAlign'"):
        ROIPooler(3, (1 / 4,), 0, "RoIAlign")
    with pytest.raises(NotImplementedError, match="Detectron2"):
        ROIPooler(3, (1 / 4,), 0, "ROIAlignRotated")
    pooler = ROIPooler(3, (1 / 4,), 0, "ROIAlign")
    with pytest.raises(ValueError, match="2 feature maps"):
        pooler([torch.zeros(1, 4, 8, 8)] * 2, [Boxes(torch.zeros(0, 4))])
    with pytest.raises(ValueError, match="2 images"):
        pooler([torch.zeros(1, 4, 8, 8)], [Boxes(torch.zeros(0, 4))] * 2)


# ------------------------------------------------------------------------------------------- whole heads


@pytest.mark.parametrize("name, mask", ALL_HEADS)
@pytest.mark.parametrize(
    "boxes, count",
    [(([], []), 6), (([], []), 0), (([], [[3, 3, 30, 30]]), 6), (([[7, 9, 8, 10]], [[0, 0, 1, 1]]), 0)],
    ids=["no object", "nothing at all", "one image without", "one pixel"],
)
def test_losses_are_finite_and_reach_every_parameter(name, mask, boxes, count):
    heads = make_heads(heads_config(name, mask))
    features = make_features(heads)
    with EventStorage():
        _, losses = heads(
            ImageList(torch.zeros(2, 3, 64, 64), SIZES),
            features,
            make_proposals(count),
            make_ground_truth(*boxes, mask=mask),
        )
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert ("loss_mask" in losses) == mask
    assert all(x.grad is not None for x in features.values())
    trainable = [p for p in heads.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable)
    if not any(boxes):
        assert all(loss == 0 for n, loss in losses.items() if "cls" not in n)


@pytest.mark.parametrize("name, mask", ALL_HEADS)
@pytest.mark.parametrize("count", [0, 5])
def test_inference(name, mask, count):
    heads = make_heads(heads_config(name, mask)).eval()
    features = make_features(heads)
    proposals = make_proposals(count)
    proposals[1] = proposals[1][torch.zeros(count, dtype=torch.bool)]
    with torch.no_grad():
        detections, losses = heads(ImageList(torch.zeros(2, 3, 64, 64), SIZES), features, proposals)
    assert losses == {}
    assert [len(x) > 0 for x in detections] == [count > 0, False]
    fields = {"pred_boxes", "scores", "pred_classes"} | ({"pred_masks"} if mask else set())
    side = {"Res5ROIHeads": 6}.get(name, 28)
    for size, x in zip(SIZES, detections):
        assert x.image_size == size and x.get_fields().keys() == fields
        assert (x.scores.diff() <= 0).all()
        assert x.pred_boxes.inside_box((size[0] + 1, size[1] + 1)).all()
        assert not mask or x.pred_masks.shape == (len(x), 1, side, side)


@pytest.mark.parametrize("name", ["StandardROIHeads", "CascadeROIHeads", "Res5ROIHeads"])
def test_non_finite_features_give_no_detection(name):
    heads = make_heads(heads_config(name, mask=True)).eval()
    for value in (math.nan, math.inf):
        features = {k: torch.full_like(v, value) for k, v in make_features(heads).items()}
        with torch.no_grad():
            detections, _ = heads(ImageList(torch.zeros(2, 3, 64, 64), SIZES), features, make_proposals(4))
        assert [len(x) for x in detections] == [0, 0]


def test_samples_keep_to_the_batch_size_and_carry_their_ground_truth():
    heads = make_heads(heads_config("StandardROIHeads", mask=True))
    proposals = make_proposals(50)
    jitter = torch.rand(20, 4)
    proposals[0].proposal_boxes.tensor[:30] = torch.tensor([0.0, 0, 3, 3])  # too small for the first object
    proposals[0].proposal_boxes.tensor[30:] = torch.tensor([10.0, 10, 40, 40]) + jitter
    targets = make_ground_truth([[0, 0, 9, 9], [10, 10, 40, 40]], [], mask=True)
    with EventStorage() as storage:
        first, second = heads.label_and_sample_proposals(proposals, targets)
    foreground = first.gt_classes < NUM_CLASSES
    assert len(first) == len(second) == 16
    assert foreground.sum() == 4 and foreground[:4].all()
    for i in range(4):
        target = targets[0][int(first.gt_classes[i])]  # the class is the index of the object here
        assert torch.equal(first.gt_boxes.tensor[i], target.gt_boxes.tensor[0])
        assert torch.equal(first.gt_masks.tensor[i], target.gt_masks.tensor[0])
    assert (second.gt_classes == NUM_CLASSES).all()
    assert not second.has("gt_boxes")
    counts = {k: v[0] for k, v in storage.latest().items()}
    assert counts == {"roi_head/num_fg_samples": 2, "roi_head/num_bg_samples": 14}


def test_ground_truth_is_appended_only_on_demand():
    targets = make_ground_truth([[10, 10, 40, 40]], [])
    for append, expected in ((True, 1), (False, 0)):
        cfg = heads_config("StandardROIHeads")
        cfg.MODEL.ROI_HEADS.PROPOSAL_APPEND_GT = append
        with EventStorage():
            sampled = make_heads(cfg).label_and_sample_proposals(make_proposals(3), targets)
        assert (sampled[0].gt_classes < NUM_CLASSES).sum() == expected


def test_proposals_between_the_thresholds_are_ignored():
    cfg = heads_config("StandardROIHeads")
    cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS, cfg.MODEL.ROI_HEADS.IOU_LABELS = [0.3, 0.7], [0, -1, 1]
    proposals = make_proposals(3)
    proposals[0].proposal_boxes.tensor[1] = torch.tensor([10.0, 10, 40, 25])  # IoU 0.5
    with EventStorage():
        sampled, _ = make_heads(cfg).label_and_sample_proposals(proposals, make_ground_truth([[10, 10, 40, 40]], []))
    assert sampled.gt_classes.tolist() == [0, NUM_CLASSES, NUM_CLASSES]


@pytest.mark.parametrize("name", ["StandardROIHeads", "CascadeROIHeads", "Res5ROIHeads"])
def test_class_out_of_range_is_named(name):
    heads = make_heads(heads_config(name))
    targets = make_ground_truth([[5, 5, 20, 20]], [[5, 5, 20, 20]])
    targets[1].gt_classes[0] = NUM_CLASSES
    with EventStorage(), pytest.raises(ValueError, match=r"class 3, but MODEL.ROI_HEADS.NUM_CLASSES is 3"):
        heads(ImageList(torch.zeros(2, 3, 64, 64), SIZES), make_features(heads), make_proposals(4), targets)


def test_masks_are_needed_for_a_mask_head():
    heads = make_heads(heads_config("StandardROIHeads", mask=True))
    targets = make_ground_truth([[5, 5, 20, 20]], [])
    with EventStorage(), pytest.raises(ValueError, match="MODEL.MASK_ON needs `gt_masks`"):
        heads(ImageList(torch.zeros(2, 3, 64, 64), SIZES), make_features(heads), make_proposals(4), targets)


def test_mask_head_can_train_on_predicted_boxes():
    cfg = heads_config("StandardROIHeads", mask=True)
    cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES = True
    heads = make_heads(cfg)
    torch.nn.init.normal_(heads.box_predictor.bbox_pred.bias, std=2)
    seen = []
    heads.mask_pooler.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[1]))
    targets = make_ground_truth([[5, 5, 20, 20]], [], mask=True)
    with EventStorage():
        heads(ImageList(torch.zeros(2, 3, 64, 64), SIZES), make_features(heads), make_proposals(0), targets)
    bias = heads.box_predictor.bbox_pred.bias.detach()[:4][None]
    shift = torch.tensor([[5.0, 5, 20, 20]])
    expected = Box2BoxTransform((10.0, 10.0, 5.0, 5.0)).apply_deltas(bias, shift)
    assert torch.allclose(seen[0].tensor, expected, atol=1.0) and not torch.allclose(seen[0].tensor, shift)
    assert not seen[0].tensor.requires_grad


def test_what_is_left_out_is_named():
    cfg = heads_config("StandardROIHeads")
    cfg.MODEL.KEYPOINT_ON = True
    with pytest.raises(NotImplementedError, match="MODEL.KEYPOINT_ON.*Detectron2"):
        make_heads(cfg)
    cfg = heads_config("StandardROIHeads")
    cfg.MODEL.ROI_HEADS.NAME = "RROIHeads"
    with pytest.raises(NotImplementedError, match="RROIHeads.*Detectron2"):
        make_heads(cfg)


def test_heads_shared_by_levels_need_equal_channels():
    shapes = {**FPN_SHAPES, "p4": ShapeSpec(channels=9, stride=16)}
    with pytest.raises(ValueError, match=r"ROI_HEADS.IN_FEATURES.*\[8, 8, 9\]"):
        build_roi_heads(heads_config("StandardROIHeads"), shapes)


@pytest.mark.parametrize("opts", [[], ["MODEL.MASK_ON", True]], ids=["Faster R-CNN", "Mask R-CNN"])
def test_default_config_is_a_c4_model(opts):
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.RESNETS.NORM", "FrozenBN", *opts])
    model = build_model(cfg)
    names = {n: tuple(p.shape) for n, p in model.roi_heads.named_parameters()}
    assert names["res5.0.conv1.weight"] == (512, 1024, 1, 1)
    assert names["res5.0.shortcut.weight"] == (2048, 1024, 1, 1)
    assert names["res5.2.conv3.weight"] == (2048, 512, 1, 1)
    assert names["box_predictor.cls_score.weight"] == (81, 2048)
    assert names["box_predictor.bbox_pred.weight"] == (320, 2048)
    assert (names.get("mask_head.deconv.weight") == (2048, 256, 2, 2)) == bool(opts)
    assert model.roi_heads.res5[0].conv1.stride == (2, 2)
    assert not any("res5" in n for n, _ in model.backbone.named_parameters())


# ---------------------------------------------------------------------------------------------- cascade


def test_cascade_divides_the_gradient_of_the_features_by_its_stages():
    heads = make_heads(heads_config("CascadeROIHeads"))
    proposals = make_proposals(3)
    gradients = []
    for training in (True, False):
        heads.train(training)
        features = make_features(heads)
        scores, _ = heads._run_stage(list(features.values()), proposals, 1)
        scores.square().sum().backward()
        gradients.append(features["p2"].grad)
    assert torch.allclose(gradients[0] * 3, gradients[1]) and gradients[0].abs().sum() > 0


def test_cascade_stages_get_the_boxes_of_the_stage_before():
    heads = make_heads(heads_config("CascadeROIHeads"))
    seen = []
    heads.box_pooler.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1][0].tensor))
    for predictor, shift in zip(heads.box_predictor, (1.0, 2.0, 3.0)):
        torch.nn.init.zeros_(predictor.bbox_pred.weight)
        predictor.bbox_pred.bias.data[0] = shift
    targets = make_ground_truth([[5, 5, 25, 25]], [])
    with EventStorage() as storage:
        _, losses = heads(ImageList(torch.zeros(2, 3, 64, 64), SIZES), make_features(heads), make_proposals(0), targets)
    assert torch.allclose(seen[0], torch.tensor([[5.0, 5, 25, 25]]))
    assert torch.allclose(seen[1], torch.tensor([[7.0, 5, 27, 25]]))  # 1 / weight 10 of the width 20
    assert torch.allclose(seen[2], torch.tensor([[9.0, 5, 29, 25]]))  # 2 / weight 20
    assert losses.keys() == {f"{n}_stage{k}" for n in ("loss_cls", "loss_box_reg") for k in range(3)}
    # IoU 18 / 22 with the object is enough for stage 1, and 16 / 24 not for stage 2
    latest = {k: v[0] for k, v in storage.latest().items()}
    assert latest["stage1/roi_head/num_fg_samples"] == 0.5
    assert latest["stage2/roi_head/num_fg_samples"] == 0
    assert losses["loss_box_reg_stage1"] > 0 and losses["loss_box_reg_stage2"] == 0


def test_cascade_drops_empty_boxes_in_training_only():
    heads = make_heads(heads_config("CascadeROIHeads"))
    boxes = torch.tensor([[70.0, 5, 80, 9], [5, 5, 80, 9]])
    for training, expected in ((True, [[5, 5, 64, 9]]), (False, [[64, 5, 64, 9], [5, 5, 64, 9]])):
        (x,) = heads.train(training)._create_proposals_from_boxes([boxes], SIZES[:1])
        assert x.proposal_boxes.tensor.tolist() == expected and x.image_size == SIZES[0]


def test_cascade_config_errors():
    cfg = heads_config("CascadeROIHeads")
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = False
    with pytest.raises(ValueError, match="CLS_AGNOSTIC_BBOX_REG True"):
        make_heads(cfg)
    cfg = heads_config("CascadeROIHeads")
    cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS = (0.5, 0.6)
    with pytest.raises(ValueError, match="one entry per stage.* 3 and 2"):
        make_heads(cfg)
    cfg = heads_config("CascadeROIHeads")
    cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS = [0.4]
    with pytest.raises(ValueError, match=r"IOUS \(0.5\).*IOU_THRESHOLDS \(0.4\)"):
        make_heads(cfg)


# ------------------------------------------------------------------------------------- boxes and classes


def make_predictor(**kwargs) -> FastRCNNOutputLayers:
    torch.manual_seed(0)
    transform = Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
    return FastRCNNOutputLayers(6, box2box_transform=transform, num_classes=3, **kwargs)


def labeled_proposals() -> Instances:
    x = Instances((50, 50))
    x.proposal_boxes = Boxes(torch.tensor([[1.0, 1, 20, 20], [5, 5, 30, 25], [2, 2, 9, 9]]))
    x.gt_boxes = Boxes(torch.tensor([[1.0, 2, 22, 20], [5, 5, 30, 30], [0, 0, 0, 0]]))
    x.gt_classes = torch.tensor([2, 0, 3])
    return x


@pytest.mark.parametrize("loss_type", ["smooth_l1", "giou", "diou", "ciou"])
def test_box_loss_uses_the_true_class_only(loss_type):
    predictor = make_predictor(box_reg_loss_type=loss_type)
    scores = torch.zeros(3, 4, requires_grad=True)
    deltas = torch.full((3, 12), 0.3, requires_grad=True)
    with EventStorage():
        losses = predictor.losses((scores, deltas), [labeled_proposals()])
    losses["loss_box_reg"].backward()
    used = torch.zeros(3, 12, dtype=torch.bool)
    used[0, 8:] = used[1, :4] = True
    assert (deltas.grad[~used] == 0).all()
    assert (deltas.grad[0, 8:] != 0).any() and (deltas.grad[1, :4] != 0).any()
    assert torch.isclose(losses["loss_cls"], torch.tensor(math.log(4)))


def test_box_loss_is_averaged_over_all_regions_and_weighted():
    with EventStorage():
        plain, weighted, agnostic = (
            make_predictor(**kwargs).losses((torch.zeros(3, 4), torch.zeros(3, width)), [labeled_proposals()])
            for kwargs, width in (
                ({}, 12),
                ({"loss_weight": {"loss_box_reg": 2.0}}, 12),
                ({"cls_agnostic_bbox_reg": True}, 4),
            )
        )
    x = labeled_proposals()
    targets = Box2BoxTransform((10.0, 10.0, 5.0, 5.0)).get_deltas(x.proposal_boxes.tensor[:2], x.gt_boxes.tensor[:2])
    assert torch.isclose(plain["loss_box_reg"], targets.abs().sum() / 3)
    assert torch.isclose(weighted["loss_box_reg"], 2 * plain["loss_box_reg"])
    assert torch.isclose(agnostic["loss_box_reg"], plain["loss_box_reg"])
    assert weighted["loss_cls"] == plain["loss_cls"]


def test_classification_statistics():
    scores = torch.zeros(3, 4)
    scores[0, 2] = scores[1, 3] = scores[2, 1] = 5  # right, missed, wrong
    with EventStorage() as storage:
        make_predictor().losses((scores, torch.zeros(3, 12)), [labeled_proposals()])
    latest = {k: v[0] for k, v in storage.latest().items()}
    assert latest == {
        "fast_rcnn/cls_accuracy": pytest.approx(1 / 3),
        "fast_rcnn/fg_cls_accuracy": 0.5,
        "fast_rcnn/false_negative": 0.5,
    }


def test_boxes_of_the_true_class():
    predictor = make_predictor()
    x = labeled_proposals()
    deltas = torch.randn(3, 12)
    (boxes,) = predictor.predict_boxes_for_gt_classes((None, deltas), [x])
    (every,) = predictor.predict_boxes((None, deltas), [x])
    assert torch.equal(boxes[0], every[0, 8:]) and torch.equal(boxes[1], every[1, :4])
    agnostic = make_predictor(cls_agnostic_bbox_reg=True)
    (boxes,) = agnostic.predict_boxes_for_gt_classes((None, deltas[:, :4]), [x])
    assert torch.equal(boxes, agnostic.predict_boxes((None, deltas[:, :4]), [x])[0])


def test_sigmoid_classification():
    predictor = make_predictor(use_sigmoid_ce=True)
    x = labeled_proposals()
    (probs,) = predictor.predict_probs(predictor(torch.zeros(3, 6)), [x])
    assert torch.allclose(probs, torch.full((3, 4), 0.01))
    scores = torch.randn(3, 4, requires_grad=True)
    with EventStorage():
        loss = predictor.losses((scores, torch.zeros(3, 12)), [x])["loss_cls"]
    target = torch.tensor([[0, 0, 1], [1, 0, 0], [0, 0, 0]])
    p = scores[:, :3].sigmoid()
    assert torch.isclose(loss, -torch.where(target == 1, p, 1 - p).log().sum() / 3)
    loss.backward()
    assert (scores.grad[:, 3] == 0).all() and (scores.grad[:, :3] != 0).all()


@pytest.mark.parametrize("sigmoid", [False, True])
def test_no_region_at_all_gives_losses_with_a_gradient(sigmoid):
    predictor = make_predictor(use_sigmoid_ce=sigmoid)
    losses = predictor.losses(predictor(torch.zeros(0, 6)), [])
    sum(losses.values()).backward()
    assert all(loss == 0 for loss in losses.values())
    assert all((p.grad == 0).all() for p in predictor.parameters())
    assert predictor.inference(predictor(torch.zeros(0, 6)), []) == ([], [])


def test_federated_loss_counts_a_sample_of_the_classes():
    weights = torch.tensor([1.0, 0.0, 5.0])
    predictor = make_predictor(
        use_sigmoid_ce=True,
        use_fed_loss=True,
        get_fed_loss_cls_weights=lambda: weights,
        fed_loss_num_classes=3,
    )
    assert torch.equal(predictor.state_dict()["fed_loss_cls_weights"], weights)
    # 0 and the background occur; of the others, 1 has no chance to be drawn
    classes = predictor.get_fed_loss_classes(torch.tensor([0, 3, 0]), 3, 3, weights)
    assert sorted(classes.tolist()) == [0, 2, 3]
    scores = torch.zeros(3, 4, requires_grad=True)
    predictor.sigmoid_cross_entropy_loss(scores, torch.tensor([0, 3, 0])).backward()
    assert (scores.grad.abs().sum(0) > 0).tolist() == [True, False, True, False]
    with pytest.raises(ValueError, match="USE_SIGMOID_CE"):
        make_predictor(use_fed_loss=True, get_fed_loss_cls_weights=lambda: weights)
    with pytest.raises(ValueError, match="2 classes for 3 classes"):
        make_predictor(use_sigmoid_ce=True, use_fed_loss=True, get_fed_loss_cls_weights=lambda: weights[:2])


def test_detections_are_thresholded_suppressed_per_class_and_limited():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 11], [90, 0, 130, 10]])
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7]])
    (x,), (kept,) = fast_rcnn_inference([boxes], [probs], [(50, 100)], 0.15, 0.5, 100)
    assert torch.equal(x.scores, torch.tensor([0.6, 0.4, 0.2]))
    assert x.pred_classes.tolist() == [0, 1, 1] and kept.tolist() == [0, 1, 2]
    assert x.pred_boxes.tensor[2].tolist() == [90, 0, 100, 10]
    for topk, expected in ((2, 2), (0, 0), (-1, 3)):
        (x,), _ = fast_rcnn_inference([boxes], [probs], [(50, 100)], 0.15, 0.5, topk)
        assert len(x) == expected


def test_box_head_shapes():
    shape = ShapeSpec(channels=4, height=3, width=2)
    head = FastRCNNConvFCHead(shape, conv_dims=[5, 6], fc_dims=[7], conv_norm="BN")
    assert head.output_shape == ShapeSpec(channels=7) and head(torch.zeros(2, 4, 3, 2)).shape == (2, 7)
    assert head.conv1.bias is None and head.fc1.weight.shape == (7, 36)
    head = FastRCNNConvFCHead(shape, conv_dims=[5], fc_dims=[])
    assert head.output_shape == ShapeSpec(channels=5, height=3, width=2)
    assert head(torch.zeros(0, 4, 3, 2)).shape == (0, 5, 3, 2)
    with pytest.raises(ValueError, match="NUM_CONV or NUM_FC"):
        FastRCNNConvFCHead(shape, conv_dims=[], fc_dims=[])


# ------------------------------------------------------------------------------------------------ masks


def foreground(classes: list[int]) -> Instances:
    x = Instances((40, 40))
    x.proposal_boxes = Boxes(torch.tensor([[4.0, 4, 12, 12]]).repeat(len(classes), 1))
    x.gt_classes = torch.tensor(classes)
    masks = torch.zeros(len(classes), 40, 40, dtype=torch.bool)
    masks[:, :, 8:] = True
    x.gt_masks = BitMasks(masks)
    return x


@pytest.mark.parametrize("num_classes", [1, 3])
def test_mask_loss_is_that_of_the_true_class_inside_the_box(num_classes):
    head = MaskRCNNConvUpsampleHead(ShapeSpec(channels=2), num_classes=num_classes, conv_dims=[4], loss_weight=2.0)
    logits = torch.zeros(2, num_classes, 4, 4)
    for i, k in enumerate((2, 1)):
        logits[i, k % num_classes, :, 2:] = 3  # the true mask is the right half of the box
        logits[i, k % num_classes, :, :2] = -3
    head.layers = lambda x: logits
    with EventStorage() as storage:
        loss = head(None, [foreground([2]), foreground([1])])["loss_mask"]
    assert torch.isclose(loss, torch.tensor(2 * math.log(1 + math.exp(-3))))
    latest = {k: v[0] for k, v in storage.latest().items()}
    assert latest == {
        "mask_rcnn/accuracy": 1,
        "mask_rcnn/false_positive": 0,
        "mask_rcnn/false_negative": 0,
    }


def test_mask_pictures():
    head = MaskRCNNConvUpsampleHead(ShapeSpec(channels=2), num_classes=3, conv_dims=[4], vis_period=2)
    with EventStorage(2) as storage:
        head(torch.zeros(1, 2, 3, 3), [foreground([0])])
    ((_, image, _),) = storage._vis_data
    assert image.shape == (3, 6, 12)
    with EventStorage(3) as storage:
        head(torch.zeros(1, 2, 3, 3), [foreground([0])])
    assert not storage._vis_data


@pytest.mark.parametrize("num_classes", [1, 3])
def test_mask_of_the_predicted_class(num_classes):
    logits = torch.randn(3, num_classes, 4, 4)
    detections = [Instances((9, 9), pred_classes=torch.tensor(c, dtype=torch.int64)) for c in ([2, 0], [], [1])]
    mask_rcnn_inference(logits, detections)
    masks = torch.cat([x.pred_masks for x in detections])
    assert [x.pred_masks.shape for x in detections] == [(2, 1, 4, 4), (0, 1, 4, 4), (1, 1, 4, 4)]
    for i, k in enumerate((2, 0, 1)):
        assert torch.allclose(masks[i, 0], logits[i, k % num_classes].sigmoid())


def test_foreground_selection():
    x = Instances((9, 9), gt_classes=torch.tensor([3, 0, -1, 2]), index=torch.arange(4))
    (selected,), (mask,) = select_foreground_proposals([x], 3)
    assert selected.index.tolist() == [1, 3] and mask.tolist() == [False, True, False, True]


def test_torchscript_compiles_pooler_and_box_head():
    features = [torch.rand(1, 4, 32, 32), torch.rand(1, 4, 16, 16)]
    boxes = [Boxes(torch.tensor([[1.0, 1.0, 5.0, 5.0], [3.0, 3.0, 120.0, 110.0]]))]
    pooler = ROIPooler(7, (0.25, 0.125), 0, "ROIAlignV2", canonical_box_size=56)
    pooled = pooler(features, boxes)
    assert torch.equal(torch.jit.script(pooler)(features, boxes), pooled)

    head = FastRCNNConvFCHead(ShapeSpec(channels=4, height=7, width=7), conv_dims=[5], fc_dims=[6]).eval()
    assert torch.equal(torch.jit.script(head)(pooled), head(pooled))


def test_traced_pooler_holds_for_other_boxes():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = ROIPooler(7, (0.25, 0.125), 0, "ROIAlignV2", canonical_box_size=56)

        def forward(self, x, boxes):
            return self.pool(x, [Boxes(boxes)])

    features = [torch.rand(1, 4, 32, 32), torch.rand(1, 4, 16, 16)]
    boxes = torch.rand(12, 2).repeat(1, 2) * 60 + torch.tensor([0.0, 0.0, 1.0, 1.0]) * torch.rand(12, 1) * 60
    model = Model()
    traced = torch.jit.trace(model, (features, boxes[:10]))
    for n in (0, 5, 12):
        torch.testing.assert_close(traced(features, boxes[:n]), model(features, boxes[:n]))
