"""Anchors, box encodings, matcher, sampling and postprocessing: edges and properties beyond the fixtures."""

import copy

import pytest
import torch
from fvcore.nn import giou_loss, smooth_l1_loss

from d2lite.config import get_cfg
from d2lite.layers import ShapeSpec
from d2lite.modeling import build_anchor_generator, detector_postprocess
from d2lite.modeling.anchor_generator import DefaultAnchorGenerator
from d2lite.modeling.box_regression import (
    Box2BoxTransform,
    Box2BoxTransformLinear,
    _dense_box_regression_loss,
)
from d2lite.modeling.matcher import Matcher
from d2lite.modeling.postprocessing import sem_seg_postprocess
from d2lite.modeling.sampling import subsample_labels
from d2lite.structures import Boxes, Instances


def random_boxes(n: int, size: float = 100.0) -> torch.Tensor:
    corner = torch.rand(n, 2) * size
    return torch.cat([corner, corner + 1 + torch.rand(n, 2) * size], dim=1)


def small_generator() -> DefaultAnchorGenerator:
    return DefaultAnchorGenerator(sizes=[[8], [16]], aspect_ratios=[[0.5, 2.0]], strides=[4, 8], offset=0.0)


def grids(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.zeros(1, 2, *size) for size in sizes]


# ---- anchors -------------------------------------------------------------------------------------------------


def test_anchors_from_config_cover_every_cell():
    cfg = get_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32, 64]]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.25, 1, 4]]
    generator = build_anchor_generator(cfg, [ShapeSpec(stride=4)])
    (anchors,) = generator(grids((3, 5)))
    assert len(anchors) == 3 * 5 * 6 == 3 * 5 * generator.num_cell_anchors[0]
    centers = anchors.get_centers().view(3, 5, 6, 2)
    assert torch.allclose(centers[2, 4], torch.tensor([16.0, 8.0]).expand(6, 2), atol=1e-4)
    area = anchors.area().view(3, 5, 6)
    assert torch.allclose(area[1, 1], torch.tensor([32.0**2] * 3 + [64.0**2] * 3), rtol=1e-5)
    width_height = anchors.tensor[:, 2:] - anchors.tensor[:, :2]
    ratio = (width_height[:, 1] / width_height[:, 0])[:3]
    assert torch.allclose(ratio, torch.tensor([0.25, 1.0, 4.0]))


def test_anchors_are_reused_until_they_are_changed():
    generator = small_generator()
    features = grids((4, 6), (2, 3))
    first = generator(features)
    expected = first[0].tensor.clone()
    assert generator(features)[0].tensor.data_ptr() == first[0].tensor.data_ptr()
    first[0].clip((1, 1))
    assert torch.equal(generator(features)[0].tensor, expected)
    assert len(generator(grids((5, 6), (3, 3)))[0]) == 5 * 6 * 2


def test_anchors_made_in_inference_mode_can_be_trained_on():
    generator = small_generator()
    features = grids((4, 6), (2, 3))
    with torch.inference_mode():
        generator(features)
    anchors = Boxes.cat(generator(features)).tensor
    deltas = torch.zeros(len(anchors), 4, requires_grad=True)
    Box2BoxTransform((1.0, 1.0, 1.0, 1.0)).apply_deltas(deltas, anchors).sum().backward()
    assert deltas.grad.abs().sum() > 0


def test_anchor_cache_is_bounded():
    generator = small_generator()
    for i in range(1, 2 * generator.cache_size):
        generator(grids((i, 1), (1, 1)))
    assert len(generator._cache) == generator.cache_size


def test_anchors_are_not_saved():
    generator = small_generator()
    generator(grids((4, 6), (2, 3)))
    assert generator.state_dict() == {}
    assert torch.equal(copy.deepcopy(generator).cell_anchors[1], generator.cell_anchors[1])


def test_anchor_parameters_must_fit_the_levels():
    with pytest.raises(AssertionError, match="sizes has 2 lists for 3 feature levels"):
        DefaultAnchorGenerator(sizes=[[8], [16]], aspect_ratios=[[1.0]], strides=[4, 8, 16])
    with pytest.raises(AssertionError, match="offset"):
        DefaultAnchorGenerator(sizes=[[8]], aspect_ratios=[[1.0]], strides=[4], offset=1.0)
    with pytest.raises(ValueError):
        small_generator()(grids((4, 6)))


def test_rotated_anchors_are_left_out():
    cfg = get_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "RotatedAnchorGenerator"
    with pytest.raises(NotImplementedError, match="RotatedAnchorGenerator.*Detectron2"):
        build_anchor_generator(cfg, [ShapeSpec(stride=4)])


# ---- box encodings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform",
    [
        Box2BoxTransform((5.0, 3.0, 10.0, 2.0)),
        Box2BoxTransform((10.0, 10.0, 5.0, 5.0)),
        Box2BoxTransformLinear(),
        Box2BoxTransformLinear(normalize_by_size=False),
    ],
)
def test_decoding_inverts_encoding(transform):
    torch.manual_seed(0)
    source = random_boxes(20)
    # the linear encoding needs the center of the source inside the target
    target = source + torch.rand(20, 4) * torch.tensor([-1.0, -1.0, 1.0, 1.0]) * 5
    assert torch.allclose(transform.apply_deltas(transform.get_deltas(source, target), source), target, atol=1e-3)


@pytest.mark.parametrize("transform", [Box2BoxTransform((1.0, 1.0, 1.0, 1.0)), Box2BoxTransformLinear()])
def test_encodings_of_nothing(transform):
    empty = torch.zeros(0, 4)
    assert transform.get_deltas(empty, empty).shape == (0, 4)
    assert transform.apply_deltas(torch.zeros(0, 12), empty).shape == (0, 12)


def test_half_precision_deltas_are_decoded_in_single_precision():
    boxes = Box2BoxTransform((1.0, 1.0, 1.0, 1.0)).apply_deltas(
        torch.zeros(1, 4, dtype=torch.float16), torch.tensor([[1000.25, 1000.25, 1010.5, 1010.5]])
    )
    assert boxes.tolist() == [[1000.25, 1000.25, 1010.5, 1010.5]]


def test_encoding_needs_boxes_with_an_area():
    with pytest.raises(AssertionError, match="must be positive"):
        Box2BoxTransform((1.0, 1.0, 1.0, 1.0)).get_deltas(torch.tensor([[3.0, 3, 3, 5]]), torch.ones(1, 4))


def dense_inputs():
    torch.manual_seed(1)
    anchors = [Boxes(random_boxes(6)), Boxes(random_boxes(3))]
    deltas = [torch.randn(2, 6, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)]
    gt_boxes = [random_boxes(9), random_boxes(9)]
    return anchors, deltas, gt_boxes


def test_dense_regression_loss_is_the_sum_over_the_foreground():
    anchors, deltas, gt_boxes = dense_inputs()
    transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
    foreground = torch.zeros(2, 9, dtype=torch.bool)
    foreground[0, 2] = foreground[1, 7] = True
    chosen = [(anchors[0].tensor[2:3], deltas[0][0, 2:3], gt_boxes[0][2:3])]
    chosen.append((anchors[1].tensor[1:2], deltas[1][1, 1:2], gt_boxes[1][7:8]))
    smooth = sum(smooth_l1_loss(d, transform.get_deltas(a, g), 0.1, "sum") for a, d, g in chosen)
    giou = sum(giou_loss(transform.apply_deltas(d, a), g, "sum") for a, d, g in chosen)
    args = (anchors, transform, deltas, gt_boxes, foreground)
    assert torch.allclose(_dense_box_regression_loss(*args, smooth_l1_beta=0.1), smooth)
    assert torch.allclose(_dense_box_regression_loss(*args, box_reg_loss_type="giou"), giou)


@pytest.mark.parametrize("kind", ["smooth_l1", "giou", "diou", "ciou"])
def test_dense_regression_loss_without_foreground_is_a_connected_zero(kind):
    anchors, deltas, gt_boxes = dense_inputs()
    foreground = torch.zeros(2, 9, dtype=torch.bool)
    transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
    loss = _dense_box_regression_loss(anchors, transform, deltas, gt_boxes, foreground, kind)
    loss.backward()
    assert loss == 0 and all(torch.equal(d.grad, torch.zeros_like(d)) for d in deltas)


def test_dense_regression_loss_of_unknown_type():
    anchors, deltas, gt_boxes = dense_inputs()
    with pytest.raises(ValueError, match="'l2'.*smooth_l1, giou, diou or ciou"):
        _dense_box_regression_loss(
            anchors, Box2BoxTransformLinear(), deltas, gt_boxes, torch.zeros(2, 9, dtype=torch.bool), "l2"
        )


# ---- matcher -------------------------------------------------------------------------------------------------


def test_matcher_values_and_types():
    quality = torch.tensor([[0.15, 0.45, 0.2, 0.6], [0.3, 0.65, 0.05, 0.1], [0.05, 0.4, 0.25, 0.4]])
    matches, labels = Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True)(quality)
    assert matches.tolist() == [1, 1, 2, 0] and matches.dtype == torch.int64
    # no overlap reaches 0.7: the foreground is what comes closest to each ground truth
    assert labels.tolist() == [-1, 1, 0, 1] and labels.dtype == torch.int8


def test_matcher_without_predictions_or_ground_truth():
    matcher = Matcher([0.5], [0, 1])
    matches, labels = matcher(torch.zeros(0, 5))
    assert matches.tolist() == [0] * 5 and labels.tolist() == [0] * 5
    matches, labels = matcher(torch.zeros(3, 0))
    assert matches.shape == labels.shape == (0,)


@pytest.mark.parametrize(
    "thresholds, labels, message",
    [
        ([0.3, 0.7], [0, 1], "need 3 labels"),
        ([0.5], [0, 2], "-1, 0 or 1"),
        ([0.7, 0.3], [0, -1, 1], "increase"),
        ([0.0], [0, 1], "positive"),
    ],
)
def test_matcher_checks_its_parameters(thresholds, labels, message):
    with pytest.raises(AssertionError, match=message):
        Matcher(thresholds, labels)


# ---- sampling ------------------------------------------------------------------------------------------------


def test_sampling_respects_the_numbers():
    torch.manual_seed(0)
    labels = torch.tensor([5] * 10 + [1] * 6 + [-1] * 4)
    positive, negative = subsample_labels(labels, 8, 0.25, bg_label=5)
    assert len(positive) == 2 and len(negative) == 6
    assert (labels[positive] == 1).all() and (labels[negative] == 5).all()
    assert len(set(negative.tolist())) == 6
    positive, negative = subsample_labels(labels, 100, 0.5, bg_label=5)
    assert len(positive) == 6 and len(negative) == 10


def test_sampling_with_nothing_to_choose_from():
    positive, negative = subsample_labels(torch.full((4,), -1), 8, 0.5, bg_label=0)
    assert len(positive) == len(negative) == 0
    positive, negative = subsample_labels(torch.zeros(0, dtype=torch.int64), 8, 0.5, bg_label=0)
    assert len(positive) == len(negative) == 0


# ---- postprocessing ------------------------------------------------------------------------------------------


def detections() -> Instances:
    boxes = torch.tensor([[1.0, 2, 11, 12], [30.0, 30, 50, 60], [45.0, 5, 60, 10]])
    return Instances((40, 40), pred_boxes=Boxes(boxes), scores=torch.tensor([0.9, 0.8, 0.7]))


def test_postprocess_scales_clips_and_drops_empty_boxes():
    raw = detections()
    before = raw.pred_boxes.tensor.clone()
    result = detector_postprocess(raw, 80, 20)
    assert result.image_size == (80, 20)
    assert result.pred_boxes.tensor.tolist() == [[0.5, 4, 5.5, 24], [15, 60, 20, 80]]
    assert torch.allclose(result.scores, torch.tensor([0.9, 0.8]))
    assert torch.equal(raw.pred_boxes.tensor, before)


def test_postprocess_of_proposals_and_of_nothing():
    proposals = Instances((40, 40), proposal_boxes=Boxes(torch.tensor([[0.0, 0, 10, 10]])))
    assert detector_postprocess(proposals, 20, 20).proposal_boxes.tensor.tolist() == [[0, 0, 5, 5]]
    raw = detections()
    raw.pred_masks = torch.rand(3, 1, 14, 14)
    empty = detector_postprocess(raw[torch.zeros(3, dtype=torch.bool)], 20, 30)
    assert len(empty) == 0 and empty.pred_masks.shape == (0, 20, 30)
    with pytest.raises(AssertionError, match="neither pred_boxes nor proposal_boxes"):
        detector_postprocess(Instances((4, 4), scores=torch.ones(1)), 4, 4)


def test_postprocess_of_full_masks_fills_the_boxes():
    raw = detections()[:1]
    raw.pred_masks = torch.ones(1, 1, 28, 28)
    masks = detector_postprocess(raw, 40, 40).pred_masks
    assert masks.shape == (1, 40, 40) and masks.dtype == torch.bool
    assert masks[0, 2:12, 1:11].all() and masks.sum() == 100


def test_semantic_postprocess_ignores_the_padding():
    logits = torch.full((2, 8, 8), float("nan"))
    logits[:, :5, :3] = torch.tensor([1.0, -1.0])[:, None, None]
    result = sem_seg_postprocess(logits, (5, 3), 10, 12)
    assert result.shape == (2, 10, 12)
    assert (result[0] == 1).all() and (result[1] == -1).all()


def test_torchscript_compiles_matchers_and_anchors():
    def build(thresholds: list[float], labels: list[int]):
        return Matcher(thresholds, labels, allow_low_quality_matches=True)

    quality, thresholds, labels = torch.rand(3, 5), [0.3, 0.7], [0, -1, 1]
    for ours, scripted in zip(
        build(thresholds, labels)(quality), torch.jit.script(build)(thresholds, labels)(quality), strict=True
    ):
        assert torch.equal(ours, scripted)

    generator = DefaultAnchorGenerator(sizes=[32, 64], aspect_ratios=[0.5, 1, 2], strides=[4, 8])
    features = [torch.zeros(1, 2, 5, 7), torch.zeros(1, 2, 3, 4)]
    for ours, scripted in zip(generator(features), torch.jit.script(generator)(features), strict=True):
        assert torch.equal(ours.tensor, scripted.tensor)
