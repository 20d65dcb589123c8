"""RetinaNet and FCOS: empty images, extreme sizes, error messages, and what training keeps between steps."""

import math

import pytest
import torch
from fvcore.nn import sigmoid_focal_loss
from torch import nn
from torch.nn import functional as F

from d2lite.config import get_cfg
from d2lite.layers import CycleBatchNormList, ShapeSpec
from d2lite.modeling import FCOS, build_model
from d2lite.modeling.meta_arch.fcos import FCOSHead
from d2lite.modeling.meta_arch.focal_loss import dense_focal_loss
from d2lite.modeling.meta_arch.retinanet import RetinaNetHead, permute_to_N_HWA_K
from d2lite.structures import Boxes, Instances
from d2lite.utils.events import EventStorage

NUM_CLASSES = 3
LEVELS = ["p3", "p4", "p5", "p6", "p7"]


def retinanet_cfg(*options):
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]
    cfg.MODEL.RETINANET.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.RETINANET.NUM_CONVS = 1
    cfg.merge_from_list(list(options))
    return cfg


def make_retinanet(*options):
    torch.manual_seed(0)
    return build_model(retinanet_cfg(*options))


def make_fcos(**kwargs):
    torch.manual_seed(0)
    cfg = retinanet_cfg()
    backbone = build_model(cfg).backbone
    shapes = [backbone.output_shape()[name] for name in LEVELS]
    head = FCOSHead(input_shape=shapes, num_classes=NUM_CLASSES, conv_dims=[8], norm="")
    mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    return FCOS(backbone=backbone, head=head, num_classes=NUM_CLASSES, pixel_mean=mean, pixel_std=std, **kwargs)


MODELS = pytest.mark.parametrize("make", [make_retinanet, make_fcos])


def image(h=64, w=96, boxes=(), classes=(), **extra):
    instances = Instances((h, w))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    pixels = torch.randint(0, 256, (3, h, w), dtype=torch.uint8)
    return {"image": pixels, "instances": instances, **extra}


def losses_of(model, batch):
    with EventStorage(0) as storage:
        losses = model.train()(batch)
    return losses, storage.latest()


def assert_every_parameter_has_a_finite_gradient(model, losses):
    assert all(torch.isfinite(x) for x in losses.values()), losses
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


# ---- training ------------------------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize(
    "batch",
    [
        [image(), image(48, 64)],
        [image(boxes=[[5, 5, 40, 40]], classes=[1]), image(48, 64)],
        [image(boxes=[[10, 10, 11, 11], [0, 0, 96, 64]], classes=[0, 2]), image(boxes=[[3, 3, 4, 4]], classes=[1])],
        [image(1, 200, boxes=[[20, 0, 60, 1]], classes=[2]), image(200, 1, boxes=[[0, 20, 1, 60]], classes=[0])],
    ],
    ids=["all_empty", "one_empty", "one_pixel_boxes", "one_pixel_images"],
)
def test_every_parameter_gets_a_finite_gradient(make, batch):
    model = make()
    losses, _ = losses_of(model, batch)
    assert_every_parameter_has_a_finite_gradient(model, losses)


@pytest.mark.parametrize("kind", ["giou", "diou", "ciou"])
def test_retinanet_with_iou_losses(kind):
    model = make_retinanet("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", kind)
    losses, _ = losses_of(model, [image(boxes=[[5, 5, 40, 40]], classes=[1])])
    assert losses["loss_box_reg"] > 0
    assert_every_parameter_has_a_finite_gradient(model, losses)


@MODELS
def test_without_objects_only_the_background_counts(make):
    model = make()
    losses, events = losses_of(model, [image(), image()])
    assert events["num_pos_anchors"][0] == 0
    for name, value in losses.items():
        assert (value > 0) == name.endswith("cls"), name


def test_loss_normalizer_is_a_running_average_that_can_be_restored():
    model = make_retinanet()
    batch = [image(boxes=[[5, 5, 40, 40]], classes=[1])]
    assert not hasattr(model, "loss_normalizer")  # as in Detectron2: there from the first batch on
    first, events = losses_of(model, batch)
    num_foreground = events["num_pos_anchors"][0]
    assert num_foreground > 0
    assert math.isclose(model.loss_normalizer, 0.9 * 100 + 0.1 * num_foreground)
    second, _ = losses_of(model, batch)
    assert second["loss_box_reg"] > first["loss_box_reg"]
    model.loss_normalizer = 100.0
    again, _ = losses_of(model, batch)
    # BN statistics do not enter the training forward pass, so the step repeats exactly
    assert {k: v.item() for k, v in again.items()} == {k: v.item() for k, v in first.items()}


def test_a_box_that_no_anchor_covers_is_still_learned():
    model = make_retinanet().train()
    anchors = model.anchor_generator([torch.zeros(1, 8, 96 // s, 96 // s) for s in (8, 16, 32, 64, 96)])
    instances = image(96, 96, boxes=[[40, 40, 41, 41]], classes=[2])["instances"]
    (labels,), (boxes,) = model.label_anchors(anchors, [instances])
    assert set(labels.unique().tolist()) == {2, NUM_CLASSES}
    assert boxes[labels == 2].unique(dim=0).tolist() == [[40, 40, 41, 41]]


@MODELS
def test_class_outside_the_model(make):
    with pytest.raises(ValueError, match=r"a\.jpg.*class 3.*3 classes, 0 to 2.*(NUM_CLASSES|num_classes)"):
        losses_of(make(), [image(), image(boxes=[[5, 5, 40, 40]] * 2, classes=[0, 3], file_name="a.jpg")])
    with pytest.raises(ValueError, match="class -1"):
        losses_of(make(), [image(boxes=[[5, 5, 40, 40]], classes=[-1])])


@MODELS
@pytest.mark.parametrize("box", [[5, 5, 5, 40], [5, 40, 40, 5], [5, 5, math.nan, 40], [5, 5, math.inf, 40]])
def test_box_without_area_or_not_finite(make, box):
    with pytest.raises(ValueError, match=r"gt_boxes\[1\] of image 'b\.jpg'"):
        losses_of(make(), [image(boxes=[[5, 5, 40, 40], box], classes=[0, 0], file_name="b.jpg")])


@MODELS
def test_missing_annotations(make):
    batch = [image(), image()]
    del batch[1]["instances"]
    with pytest.raises(AssertionError, match="instance annotations are missing in training.*is_train"):
        losses_of(make(), batch)


@MODELS
def test_bad_pixels_are_not_hidden(make):
    batch = [image(boxes=[[5, 5, 40, 40]], classes=[1])]
    batch[0]["image"] = batch[0]["image"].float()
    batch[0]["image"][0, 10, 10] = math.nan
    losses, _ = losses_of(make(), batch)
    assert not torch.isfinite(sum(losses.values()))


def test_training_pictures():
    model = make_retinanet("VIS_PERIOD", 2).train()
    batch = [image(boxes=[[5, 5, 40, 40]], classes=[1])]
    for iteration, expected in ((1, 0), (2, 1)):
        with EventStorage(iteration) as storage:
            model(batch)
        assert len(storage._vis_data) == expected
    _, picture, _ = storage._vis_data[0]
    assert picture.shape == (3, 64, 2 * 96)


@MODELS
def test_mixed_precision_agrees_with_single_precision(make):
    torch.manual_seed(0)
    model, batch = make(), [image(boxes=[[5, 5, 40, 40]], classes=[1])]
    single, _ = losses_of(model, batch)
    model = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, _ = losses_of(model, batch)
    assert_every_parameter_has_a_finite_gradient(model, mixed)
    for name, value in mixed.items():
        assert value.dtype == torch.float32
        assert torch.allclose(value, single[name], rtol=0.05, atol=1e-3), name


# ---- inference -----------------------------------------------------------------------------------------------


@MODELS
def test_inference_maps_boxes_to_the_wanted_size(make):
    model = make().eval()
    model.test_score_thresh = 0.0
    x = image(64, 96, height=32, width=24)
    with torch.no_grad():
        (raw,) = model([x], do_postprocess=False)
        (result,) = model([x])
    assert raw.image_size == (64, 96) and result["instances"].image_size == (32, 24)
    assert 0 < len(result["instances"]) <= model.max_detections_per_image
    boxes = result["instances"].pred_boxes.tensor
    assert (boxes >= 0).all() and (boxes[:, 0::2] <= 24).all() and (boxes[:, 1::2] <= 32).all()
    scores = raw.scores
    assert (scores[:-1] >= scores[1:]).all() and ((scores >= 0) & (scores <= 1)).all()
    assert result["instances"].pred_classes.max() < NUM_CLASSES


@MODELS
def test_inference_that_finds_nothing(make):
    model = make().eval()
    model.test_score_thresh = 1.0
    with torch.no_grad():
        (result,) = model([image(1, 40)])
    assert len(result["instances"]) == 0 and result["instances"].pred_boxes.tensor.shape == (0, 4)


@MODELS
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_inference_of_predictions_that_are_not_finite(make, value):
    model = make().eval()
    images = model.preprocess_image([image()])
    with torch.no_grad():
        features = [model.backbone(images.tensor)[name] for name in model.head_in_features]
        predictions = [[torch.full_like(x, value) for x in level] for level in model.head(features)]
        (result,) = model.forward_inference(images, features, predictions)
    assert not result.pred_boxes.tensor.isfinite().any()


def test_topk_candidates_limit_each_level():
    model = make_retinanet("MODEL.RETINANET.TOPK_CANDIDATES_TEST", 2, "MODEL.RETINANET.NMS_THRESH_TEST", 1.0).eval()
    model.test_score_thresh = 0.0
    with torch.no_grad():
        (raw,) = model([image(128, 128)], do_postprocess=False)
    assert len(raw) == 2 * len(LEVELS)


# ---- heads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_class", [RetinaNetHead, FCOSHead])
def test_batch_norm_in_the_head_keeps_statistics_for_each_level(head_class):
    shapes = [ShapeSpec(channels=4, stride=s) for s in (8, 16)]
    extra = {"num_anchors": 2} if head_class is RetinaNetHead else {}
    head = head_class(input_shape=shapes, num_classes=3, conv_dims=[4, 4], norm="BN", **extra).train()
    norms = [m for m in head.modules() if isinstance(m, CycleBatchNormList)]
    assert len(norms) == 4 and all(len(norm) == 2 for norm in norms)
    head([torch.randn(2, 4, 8, 8), 50 + torch.randn(2, 4, 4, 4)])
    means = [bn.running_mean for bn in norms[0]]
    assert not torch.allclose(means[0], means[1], atol=0.05)
    assert all(bn.num_batches_tracked == 1 for norm in norms for bn in norm)
    with pytest.raises(AssertionError, match="made for 2 features, got 1"):
        head([torch.randn(2, 4, 8, 8)])


def test_heads_start_with_the_prior_probability():
    shapes = [ShapeSpec(channels=4, stride=8)]
    for head in (
        RetinaNetHead(input_shape=shapes, num_classes=3, num_anchors=2, conv_dims=[4], prior_prob=0.02),
        FCOSHead(input_shape=shapes, num_classes=3, conv_dims=[4], prior_prob=0.02),
    ):
        logits = head([torch.zeros(1, 4, 3, 3)])[0][0]
        assert torch.allclose(logits.sigmoid(), torch.tensor(0.02))
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in head.modules())


def test_head_from_config_needs_one_number_of_anchors():
    with pytest.raises(AssertionError, match="as many anchors per cell"):
        make_retinanet("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [128], [256, 512]])


def test_permutation_of_predictions():
    x = torch.arange(2 * 6 * 2 * 5).view(2, 6, 2, 5)
    y = permute_to_N_HWA_K(x, 3)
    assert y.shape == (2, 2 * 5 * 2, 3)
    row, column, anchor, k = 1, 3, 1, 2
    assert y[1, (row * 5 + column) * 2 + anchor, k] == x[1, anchor * 3 + k, row, column]


# ---- FCOS ----------------------------------------------------------------------------------------------------


def test_fcos_assigns_cells_by_scale_and_smallest_box():
    model = make_fcos()
    features = [torch.zeros(1, 8, 256 // s, 256 // s) for s in (8, 16, 32, 64, 128)]
    anchors = model.anchor_generator(features)
    assert torch.equal(anchors[0].get_centers()[0], torch.tensor([4.0, 4.0]))
    big, small = [0.0, 0.0, 250.0, 250.0], [100.0, 100.0, 140.0, 140.0]
    instances = image(256, 256, boxes=[big, small], classes=[0, 1])["instances"]
    (labels,), (boxes,) = model.label_anchors(anchors, [instances])
    per_level = labels.split([len(x) for x in anchors])
    present = [sorted(set(x.tolist()) - {NUM_CLASSES}) for x in per_level]
    # the farthest side is about 20 px away for the small box, and 125 px for the big one
    assert present == [[1], [], [0], [], []]
    centers = Boxes.cat(anchors).get_centers()
    inside = (centers[labels == 1] > 100).all() and (centers[labels == 1] < 140).all()
    assert inside and boxes[labels == 1].unique(dim=0).tolist() == [small]


def test_fcos_center_sampling_takes_fewer_cells():
    features = [torch.zeros(1, 8, 256 // s, 256 // s) for s in (8, 16, 32, 64, 128)]
    instances = [image(256, 256, boxes=[[100, 100, 150, 150]], classes=[1])["instances"]]
    counts = []
    for radius in (0, 1.5, 0.6):
        model = make_fcos(center_sampling_radius=radius)
        (labels,), _ = model.label_anchors(model.anchor_generator(features), instances)
        counts.append(int((labels == 1).sum()))
    assert counts[0] > counts[1] > counts[2] > 0


# ---- focal loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (-1, 2.0), (0.6, 0.0), (0.25, 1.5)])
def test_focal_loss_equals_the_plain_formula(alpha, gamma):
    torch.manual_seed(0)
    sizes, num_classes = [12, 5], 4
    logits = [(3 * torch.randn(2, n, num_classes)).requires_grad_() for n in sizes]
    labels = torch.randint(-1, num_classes + 1, (2, sum(sizes)))
    loss = dense_focal_loss(logits, labels, num_classes, alpha, gamma)
    grads = torch.autograd.grad(2 * loss, logits)

    valid = labels >= 0
    targets = F.one_hot(labels[valid], num_classes + 1)[:, :-1].float()
    expected = sigmoid_focal_loss(torch.cat(logits, 1)[valid], targets, alpha, gamma, "sum")
    assert torch.allclose(loss, expected, rtol=1e-5)
    for got, want in zip(grads, torch.autograd.grad(2 * expected, logits)):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-6)


def test_focal_loss_of_ignored_anchors_and_extreme_logits():
    logits = torch.tensor([[[-200.0, 200.0], [200.0, -200.0]]], requires_grad=True)
    right = dense_focal_loss([logits], torch.tensor([[1, 0]]), 2, 0.25, 2.0)
    wrong = dense_focal_loss([logits], torch.tensor([[0, -1]]), 2, 0.25, 2.0)
    (grad,) = torch.autograd.grad(wrong, logits)
    assert right == 0
    assert wrong.item() == pytest.approx(0.25 * 200 + 0.75 * 200)
    assert grad[0, 0].tolist() == pytest.approx([-0.25, 0.75]) and (grad[0, 1] == 0).all()
    half = logits.detach().half().requires_grad_()
    loss = dense_focal_loss([half], torch.tensor([[0, -1]]), 2, 0.25, 2.0)
    assert loss.dtype == torch.float32 and torch.autograd.grad(loss, half)[0].dtype == torch.float16


def test_focal_loss_needs_the_right_number_of_classes():
    with pytest.raises(AssertionError, match="expected logits of 3 classes"):
        dense_focal_loss([torch.zeros(1, 2, 4)], torch.zeros(1, 2, dtype=torch.int64), 3, 0.25, 2.0)
