"""GFL from YAML: its definitions on cases made by hand, taps, runs, processes, errors."""

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import same_tensors
from models import RETINANET, batch, config, model, write_teacher
from runs import ROOT, in_two_processes, read_checkpoint, run_training, train_in_step
from test_check import check
from test_reppoints import grid, literal_iou, one_image
from torch import Tensor, nn

from d2kd.distillers import AlignmentError, Prediction
from d2kd.distillers.predictions import check_same_meaning
from d2kd.engine import load_config
from d2kd.errors import ConfigError
from d2kd.layers import generalized_iou, paired_iou
from d2kd.modeling import build_distilled_model, init_from_teacher, num_classes
from d2kd.modeling.architectures import architecture_of
from d2kd.modeling.meta_arch.gfl import (
    BACKGROUND,
    as_box,
    assign_by_statistics,
    distribution_focal_loss,
    expected_distances,
)
from d2kd.modeling.taps import FeatureTaps
from detectron2.structures import Boxes
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

GFL = {
    **RETINANET,
    "MODEL.META_ARCHITECTURE": "GFL",
    "MODEL.BACKBONE.NAME": "build_fcos_resnet_fpn_backbone",
    "MODEL.FPN.OUT_CHANNELS": 64,
    "MODEL.GFL.NUM_CLASSES": 3,
    "MODEL.GFL.NUM_CONVS": 2,
    "MODEL.GFL.NUM_BINS": 5,
    "MODEL.GFL.ANCHOR_SCALE": 4.0,
}
LOSSES = {"loss_cls", "loss_box_reg", "loss_dfl"}


def training_losses(net: nn.Module, inputs: list[dict[str, Any]] | None = None) -> dict[str, Tensor]:
    with EventStorage():
        return net.train()(inputs or batch())


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return model(config(GFL, MODEL__GFL__SCORE_THRESH_TEST=-1.0))


# ---- definitions, against literal loops ----


def literal_assign(cells: Tensor, per_level: list[int], boxes: Tensor, scale: float, count: int) -> list[int]:
    """Algorithm 1 of arXiv 1912.02424, object by object."""
    owner, held = [BACKGROUND] * len(cells), [-1.0] * len(cells)
    middle = [((x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) * scale / 2) for x0, y0, x1, y1 in cells.tolist()]
    for number, box in enumerate(boxes.tolist()):
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        candidates, start = [], 0
        for size in per_level:
            places = range(start, start + size)
            candidates += sorted(places, key=lambda i: ((middle[i][0] - x) ** 2 + (middle[i][1] - y) ** 2, i))[:count]
            start += size
        iou = {i: literal_iou(box, [a - h, b - h, a + h, b + h]) for i in candidates for a, b, h in [middle[i]]}
        mean = sum(iou.values()) / len(iou)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in iou.values()) / max(1, len(iou) - 1))
        equal = max(iou.values()) - min(iou.values()) < 1e-9  # the mean of equal ones is that, but for rounding
        for i, value in iou.items():
            a, b, _ = middle[i]
            inside = box[0] < a < box[2] and box[1] < b < box[3]
            if inside and (equal or value >= mean + deviation) and value > held[i]:
                owner[i], held[i] = number, value
    return owner


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale, count", [(8.0, 9), (4.0, 3), (3.0, 1)])
def test_the_assigner_is_its_definition(seed, scale, count):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(10, 2, generator=generator, dtype=torch.double) * 50
    sides = torch.rand(10, 2, generator=generator, dtype=torch.double) * 50 + 0.5
    boxes = torch.cat([corner, corner + sides], dim=1).mul(2).round().div(2)  # with ties
    boxes = torch.cat([boxes, boxes[:2], torch.tensor([[500.0, 500, 600, 600], [8, 8, 8, 8]], dtype=torch.double)])
    xy, strides = grid()
    half = strides[:, None] / 2
    cells, per_level = torch.cat([xy - half, xy + half], dim=1), [64, 16, 4]
    found = assign_by_statistics(cells, per_level, boxes, scale, count)
    assert found.tolist() == literal_assign(cells, per_level, boxes, scale, count)
    assert len(set(found.tolist())) > 4


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("height, width", [(32, 64), (64, 24), (40, 40), (16, 16)])
def test_cells_that_are_not_usable_are_as_if_they_were_not_there(seed, height, width):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(10, 2, generator=generator, dtype=torch.double) * 40
    boxes = torch.cat([corner, corner + torch.rand(10, 2, generator=generator, dtype=torch.double) * 50 + 0.5], dim=1)
    xy, strides = grid()
    half = strides[:, None] / 2
    cells, per_level = torch.cat([xy - half, xy + half], dim=1), [64, 16, 4]
    usable = (xy[:, 0] < width) & (xy[:, 1] < height)
    found = assign_by_statistics(cells, per_level, boxes, 8.0, 9, usable)
    left = [int(of_level.sum()) for of_level in usable.split(per_level)]
    assert found[usable].tolist() == literal_assign(cells[usable], left, boxes, 8.0, 9)
    assert (found[~usable] == BACKGROUND).all()


def test_the_cells_of_an_object_do_not_depend_on_the_other_images_of_its_batch(net):
    def own_cells(*inputs):
        images = net.preprocess_image(list(inputs))
        with torch.no_grad():
            features = net.backbone(images.tensor)
        cells = net.anchor_generator([features[name] for name in net.head_in_features])
        labels, _ = net.label_cells(cells, [x["instances"] for x in inputs], images)
        found = labels[0] < net.num_classes
        return {tuple(cell) for cell in torch.cat([c.tensor for c in cells])[found].tolist()}

    small, large = batch([(64, 64), (192, 160)])
    small["instances"].gt_boxes.tensor[:] = torch.tensor([2.0, 2.0, 58.0, 61.0])
    alone = own_cells(small)
    assert alone and own_cells(small, large) == alone


def test_one_candidate_and_equal_ones_have_a_threshold():
    """Of one number there is no deviation, and the mean of equal ones may be above them by rounding."""
    cell = torch.tensor([[-4.0, -4, 4, 4]])
    assert assign_by_statistics(cell, [1], torch.tensor([[-3.0, -2, 5, 6]])).tolist() == [0]
    cells = torch.cat([cell + shift for shift in torch.tensor([[0.0, 0, 0, 0], [8, 0, 8, 0], [0, 8, 0, 8]])])
    for side in torch.linspace(9, 20, 40).tolist():  # inside of all three anchors, of 64 pixels
        assert 0 in assign_by_statistics(cells, [3], torch.tensor([[-4.0, -4, side - 4, side - 4]]), 8.0, 3)


def test_distances_are_means_of_their_distributions():
    logits = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    for i in range(3):
        want = []
        for side in logits[i].tolist():
            total = sum(map(math.exp, side))
            want.append(sum(step * math.exp(z) / total for step, z in enumerate(side)))
        assert expected_distances(logits)[i].tolist() == pytest.approx(want, rel=1e-5)
    assert as_box(torch.tensor([[1.0, 2, 3, 4]])).tolist() == [[-1, -2, 3, 4]]


@pytest.mark.parametrize("distance, lower, share", [(0.0, 0, 1.0), (1.25, 1, 0.75), (4.0, 4, 1.0), (7.0, 4, 0.1)])
def test_the_loss_of_distances_is_the_cross_entropy_to_both_neighbours(distance, lower, share):
    logits = torch.randn(6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    log_p = logits.log_softmax(0)
    want = -(share * log_p[lower] + (1 - share) * log_p[lower + 1])
    torch.testing.assert_close(distribution_focal_loss(logits, torch.tensor(distance)), want)


def test_losses_are_the_formulas(net):
    """Equations 2 and 6, number by number; boxes are those of the distances, in strides around the cell."""
    torch.manual_seed(0)
    levels = [torch.zeros(1, 1, side, side) for side in (4, 2, 1, 1, 1)]
    cells = Boxes.cat(net.anchor_generator(levels)[:2]).tensor
    logits, bins = torch.randn(2, 20, 3), 2 * torch.randn(2, 20, 20)
    labels, boxes = torch.full((2, 20), 3), torch.zeros(2, 20, 4)
    objects = {(0, 5): (1, [-3.0, 2, 17, 13]), (0, 17): (0, [0.0, -4, 30, 20]), (1, 6): (2, [9.0, 3, 21, 30])}
    for (image, cell), (label, box) in objects.items():
        labels[image, cell], boxes[image, cell] = label, torch.tensor(box)
    with EventStorage() as storage:
        found = net.losses(cells, logits, bins, labels, boxes)
        assert storage.latest()["num_pos_cells"][0] == 1.5
    target, weights, giou, dfl = torch.zeros(2, 20, 3), [], [], []
    for (image, cell), (label, box) in objects.items():
        x0, y0, x1, _ = cells[cell].tolist()
        stride, x, y = x1 - x0, (x0 + x1) / 2, y0 + (x1 - x0) / 2
        sides = bins[image, cell].view(4, 5)
        left, top, right, bottom = (stride * d for d in expected_distances(sides).tolist())
        pair = torch.tensor([[x - left, y - top, x + right, y + bottom]]), torch.tensor([box])
        target[image, cell, label] = paired_iou(*pair)[0]
        weights.append(logits[image, cell].sigmoid().max().item())
        giou.append(1 - generalized_iou(*pair).item())
        distances = [(x - box[0]) / stride, (y - box[1]) / stride, (box[2] - x) / stride, (box[3] - y) / stride]
        dfl.append(sum(distribution_focal_loss(s, torch.tensor(d)).item() for s, d in zip(sides, distances)) / 4)
    p = logits.sigmoid()
    quality = ((p - target).abs() ** 2 * F.binary_cross_entropy(p, target, reduction="none")).sum() / 3
    assert target.max() > 0.1 and found.keys() == LOSSES
    assert found["loss_cls"].item() == pytest.approx(quality.item(), rel=1e-4)
    total = max(1.0, sum(weights))
    assert found["loss_box_reg"].item() == pytest.approx(2 * sum(map(math.prod, zip(weights, giou))) / total, rel=1e-4)
    assert found["loss_dfl"].item() == pytest.approx(0.25 * sum(map(math.prod, zip(weights, dfl))) / total, rel=1e-4)


def test_iou_of_pairs_is_that_of_all_pairs():
    corner = torch.rand(20, 2, generator=torch.Generator().manual_seed(0))
    boxes = torch.cat([corner, corner + 0.5], dim=1)
    others = boxes.roll(1, 0)
    want = [literal_iou(a, b) for a, b in zip(boxes.tolist(), others.tolist())]
    assert paired_iou(boxes, others).tolist() == pytest.approx(want, abs=1e-5) and max(want) > 0.1


# ---- the model ----


def test_detections_are_the_best_boxes_at_every_size(net):
    inputs = batch([(96, 128)])
    with torch.no_grad():
        (plain,) = net.eval()(inputs)
        (large,) = net([{**inputs[0], "height": 192, "width": 512}])
        images = net.preprocess_image(inputs)
        levels = net.head([net.backbone(images.tensor)[name] for name in net.head_in_features])
    plain, large = plain["instances"], large["instances"]
    assert len(plain) == 100 and (plain.scores.diff() <= 0).all()
    assert plain.scores[0].item() == pytest.approx(max(x.sigmoid().max().item() for x in levels[0]))
    torch.testing.assert_close(large.pred_boxes.tensor, plain.pred_boxes.tensor * torch.tensor([4.0, 2, 4, 2]))
    best = [x.sigmoid().max().item() for x in levels[0]]
    level = best.index(max(best))
    _, y, x = (i.item() for i in torch.unravel_index(levels[0][level][0].argmax(), levels[0][level][0].shape))
    stride, sides = 8 * 2**level, levels[1][level][0, :, y, x].view(4, 5)
    left, top, right, bottom = (stride * d for d in expected_distances(sides).tolist())
    box = Boxes(torch.tensor([[stride * x - left, stride * y - top, stride * x + right, stride * y + bottom]]))
    box.clip((96, 128))
    torch.testing.assert_close(plain.pred_boxes.tensor[:1], box.tensor, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("inputs", [one_image([], []), [*one_image([], []), *one_image([], [])]], ids=["one", "two"])
def test_images_without_objects_teach_the_background_only(net, inputs):
    net.zero_grad()
    losses = training_losses(net, inputs)
    assert losses["loss_cls"] > 0 == losses["loss_box_reg"] == losses["loss_dfl"]
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)
    assert net.head.bbox_pred.weight.grad.abs().max() == 0 < net.head.cls_score.weight.grad.abs().max()


@pytest.mark.parametrize(
    "boxes, classes",
    [
        ([[20.0, 20, 20.5, 20.25], [50, 50, 51, 51]], [0, 1]),
        ([[20.0, 20, 60, 60]] * 3, [0, 1, 2]),
        ([[-500.0, -500, -400, -400], [0, 0, 128, 128]], [0, 1]),
        ([[-4000.0, -4000, 5000, 5000]], [2]),
    ],
    ids=["tiny", "identical", "out of reach", "farther than all distances"],
)
def test_unusual_objects_are_learned_with_finite_numbers(net, boxes, classes):
    net.zero_grad()
    losses = training_losses(net, one_image(boxes, classes))
    assert losses.keys() == LOSSES and all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_gives_the_same_losses_up_to_rounding(net, dtype):
    want = training_losses(net)
    with torch.autocast("cpu", dtype=dtype):
        found = training_losses(net)
    for name, loss in found.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(want[name].item(), rel=0.05)


def test_pictures_of_the_training():
    net = model(config(GFL, VIS_PERIOD=1, MODEL__GFL__SCORE_THRESH_TEST=-1.0)).train()
    with EventStorage() as storage:
        net(batch())
    ((name, picture, _),) = storage._vis_data
    assert "ground truth" in name and picture.shape[0] == 3


def test_it_reads_its_keys():
    cfg = config(
        GFL,
        MODEL__GFL__IN_FEATURES=["p3", "p4"],
        MODEL__GFL__NORM="",
        MODEL__GFL__CELL_OFFSET=0.5,
        MODEL__GFL__CANDIDATES_PER_LEVEL=5,
        MODEL__GFL__PRIOR_PROB=0.5,
        MODEL__GFL__QUALITY_FOCAL_LOSS_BETA=1.0,
        MODEL__GFL__BOX_LOSS_WEIGHT=3.0,
        MODEL__GFL__DISTRIBUTION_LOSS_WEIGHT=0.5,
        MODEL__GFL__SCORE_THRESH_TEST=0.5,
        MODEL__GFL__NMS_THRESH_TEST=0.4,
        MODEL__GFL__TOPK_CANDIDATES_TEST=7,
        TEST__DETECTIONS_PER_IMAGE=9,
    )
    net = model(cfg)
    assert (net.num_bins, net.anchor_scale, net.candidates_per_level) == (5, 4.0, 5)
    assert (net.quality_focal_loss_beta, net.box_loss_weight, net.distribution_loss_weight) == (1.0, 3.0, 0.5)
    assert (net.test_score_thresh, net.test_nms_thresh, net.test_topk_candidates) == (0.5, 0.4, 7)
    assert (net.max_detections_per_image, net.head_in_features) == (9, ["p3", "p4"])
    assert net.anchor_generator([torch.zeros(1, 1, 1, 1)] * 2)[1].tensor.tolist() == [[0, 0, 16, 16]]
    assert not net.head.cls_score.bias.any() and net.head.bbox_pred.scales.shape == (2,)
    assert len(net.head.bbox_subnet) == 4 and net.head.bbox_pred.out_channels == 20
    assert num_classes(cfg) == ("MODEL.GFL.NUM_CLASSES", 3)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"MODEL__GFL__IN_FEATURES": ["p2", "p3"]}, r"MODEL\.GFL\.IN_FEATURES names p2.*p3, p4, p5, p6, p7"),
        ({"MODEL__FPN__OUT_CHANNELS": 8}, r"MODEL\.GFL\.NORM is GN.*multiple of 32.*p3 has 8 \(MODEL\.FPN\.OUT"),
    ],
)
def test_errors_name_the_key(changes, words):
    with pytest.raises(ConfigError, match=words):
        model(config(GFL, **changes))


# ---- taps and methods ----


def test_predictions_are_taps_and_branches_lead_to_them(net):
    architecture = architecture_of(net)
    names = [p.tap for p in architecture.predictions()]
    assert names == [*(f"head.cls_score@{i}" for i in range(5)), *(f"head.bbox_pred@{i}" for i in range(5))]
    branches = architecture.head_branches()
    taps = FeatureTaps(net, [*names, *(branch.layers[-1].tap for branch in branches)])
    with torch.no_grad(), taps.recording() as maps:
        net.eval()(batch())
    assert maps["head.bbox_pred@1"].shape[1] == 20
    for branch in branches:
        torch.testing.assert_close(branch.predictor(maps[branch.layers[-1].tap]), maps[branch.prediction.tap])
    assert all((branch.decode is None) == (branch.prediction.kind == "class_logits") for branch in branches)
    boxes = branches[5].decode(torch.randn(7, 20))
    assert (boxes[:, :2] < 0).all() and (boxes[:, 2:] > 0).all()


def test_a_student_starts_from_the_teachers_head():
    student = model(config(GFL), seed=1)
    teacher = model(config(GFL, MODEL__RESNETS__DEPTH=101), seed=2)
    init_from_teacher(student, teacher)
    for name in ("weight", "bias", "scales"):
        assert torch.equal(getattr(student.head.bbox_pred, name), getattr(teacher.head.bbox_pred, name))


@pytest.mark.parametrize(
    "student, teacher, method, words",
    [
        (RETINANET, GFL, "LogitKD", "same (place of cells|anchors|meaning of a score)"),
        (GFL, RETINANET, "LogitKD", "same (place of cells|anchors|meaning of a score)"),
        (GFL, RETINANET, "HeadRegression", "make no box_deltas at the same places"),
        (RETINANET, {**RETINANET, "MODEL.FPN.OUT_CHANNELS": 12}, "LD", "make no box_distribution at the same places"),
        (GFL, RETINANET, "LD", "make no box_distribution at the same places"),
        (GFL, {**GFL, "MODEL.GFL.NUM_BINS": 6}, "LD", r"same distances that are told apart \(MODEL\.GFL\.NUM_BINS\)"),
        (GFL, {**GFL, "MODEL.GFL.CELL_OFFSET": 0.5}, "LD", r"same place of cells .*OFFSET\), but have 0\.0 and 0\.5"),
        (GFL, {**RETINANET, "MODEL.FPN.OUT_CHANNELS": 64}, "CrossKD", "student's predicts .*distributions of boxes"),
    ],
)  # fmt: skip
def test_predictions_that_mean_something_else_are_not_compared(tmp_path, student, teacher, method, words):
    named = write_teacher(tmp_path, config(teacher))
    keys = {"DISTILL__METHODS": [method], "DISTILL__INIT_FROM_TEACHER__ENABLED": False}
    with pytest.raises((AlignmentError, ValueError), match=words):
        build_distilled_model(config(student, **keys, **named))


def test_other_taps_than_those_of_a_method_are_refused(tmp_path):
    boxes = {"TAPS": ["head.bbox_pred@0"]}
    for base, method, taps, words in (
        (
            GFL,
            "HeadRegression",
            boxes,
            "predicts box_distribution; HeadRegression compares box_deltas",
        ),
        (RETINANET, "LD", boxes, "predicts box_deltas; LD compares box_distribution and class_logits"),
        (GFL, "LD", boxes, r"class logits of the same place \(anchor p3\) must be named too"),
        (GFL, "LD", {"TAPS": ["p3"]}, "TAPS names no distances to the sides of boxes"),
        (GFL, "LD", {"TAPS": ["head.cls_score@0"]}, "TAPS names no distances to the sides of boxes"),
    ):
        node = {"LD": "LD", "HeadRegression": "HEAD_REGRESSION"}[method]
        keys = {"DISTILL__METHODS": [method], **{f"DISTILL__{node}__{key}": value for key, value in taps.items()}}
        with pytest.raises(AlignmentError, match=words):
            build_distilled_model(config(base, **keys, **write_teacher(tmp_path, config(base))))


def test_what_only_the_teacher_asks_for_is_asked_for_too():
    plain = Prediction("a", "class_logits", "anchor", "p3", "sigmoid")
    check_same_meaning("here", plain, plain)
    with pytest.raises(AlignmentError, match="here: .* same unit, but have nothing that is known and pixels"):
        check_same_meaning("here", plain, plain._replace(requires={"unit": "pixels"}))


# ---- runs ----

METHODS = ["LD", "CrossKD", "FeatureMimic", "LogitKD"]


@pytest.fixture
def paths(write_config: Any, tmp_path: Any) -> Any:
    """The YAML of a student with a teacher."""
    run = {**GFL, "MODEL.GFL.NUM_CLASSES": 10, "MODEL.GFL.SCORE_THRESH_TEST": -1.0, "DISTILL.METHODS": METHODS}
    named = write_teacher(tmp_path, config({**run, "MODEL.RESNETS.WIDTH_PER_GROUP": 8}))
    keys = {key.replace(".", "__"): value for key, value in run.items()}
    return write_config(**keys, **named, DISTILL__TEACHER__EVAL_FIRST=False)


def test_a_distilled_run_resumes_bit_equal_and_logs_all_losses(paths, tmp_path):
    run_training(paths, OUTPUT_DIR=str(tmp_path / "whole"))
    run_training(paths, OUTPUT_DIR=str(tmp_path / "parts"), stop_at=3)
    run_training(paths, OUTPUT_DIR=str(tmp_path / "parts"), resume=True)
    whole, parts = read_checkpoint(tmp_path / "whole"), read_checkpoint(tmp_path / "parts")
    assert same_tensors(whole["model"], parts["model"])
    logged = (tmp_path / "whole/metrics.json").read_text()
    for name in ("loss_dfl", "num_pos_cells", "LD/head.bbox_pred@0", "CrossKD/head.bbox_subnet.", "LogitKD/head.cls"):
        assert name in logged
    assert "LD/head.cls_score" not in logged


@pytest.mark.usefixtures("forget_datasets")
def test_check_shows_no_loss_where_ld_only_looks(paths):
    rows = [re.split(r" {2,}", line) for line in check(paths).splitlines() if line.startswith("LD ")]
    losses = {row[1]: row[7] for row in rows}
    assert losses["head.cls_score@0"] == "-" and float(losses["head.bbox_pred@0"]) > 0


def test_two_processes_stay_in_step(paths, tmp_path):
    in_two_processes(train_in_step, paths, tmp_path / "two")


def _mean_losses(path: str) -> None:
    """Each process sees one image of a batch; the means of their losses and gradients go to a file."""
    net = model(config(GFL, MODEL__RESNETS__NORM="FrozenBN")).train()
    net.head.cls_score.bias.data.fill_(1.0)  # so that the sum of the weights of each process is more than 1
    images = [*one_image([[8.0, 8, 40, 40], [60, 60, 120, 125]], [0, 1]), *one_image([[30.0, 70, 62, 100]], [2])]
    with EventStorage():
        losses = net(images[comm.get_rank() :: comm.get_world_size()])
    sum(losses.values()).backward()
    values = {name: loss.detach() for name, loss in losses.items()}
    values |= {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    if comm.get_world_size() > 1:
        for value in values.values():
            torch.distributed.all_reduce(value)
            value /= 2
    if comm.is_main_process():
        torch.save(values, path)


def test_two_processes_have_the_losses_and_gradients_of_one(tmp_path):
    in_two_processes(_mean_losses, tmp_path / "two.pth")
    _mean_losses(str(tmp_path / "one.pth"))
    two, one = (torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in ("two", "one"))
    assert two.keys() == one.keys() >= LOSSES
    for name, value in one.items():
        tolerance = 1e-3 * value.abs().max().item()  # group norms of a single cell amplify rounding
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    "name, depth, schedule",
    [
        ("gfl_R50_1x", 50, (90000, [60000, 80000])),
        ("gfl_R101", 101, (180000, [120000, 160000])),
        ("gfl_R50_R101_LD_1x", 50, (90000, [60000, 80000])),
        ("gfl_R50_R101_CrossKD_1x", 50, (90000, [60000, 80000])),
    ],
)
def test_recipes_have_the_published_numbers(name, depth, schedule):
    cfg = load_config(str(ROOT / f"configs/COCO/{name}.yaml"), [])
    node, solver = cfg.MODEL.GFL, cfg.SOLVER
    assert cfg.MODEL.RESNETS.DEPTH == depth and cfg.MODEL.BACKBONE.NAME == "build_fcos_resnet_fpn_backbone"
    assert (solver.MAX_ITER, list(solver.STEPS)) == schedule
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.WARMUP_ITERS, solver.WEIGHT_DECAY) == (16, 0.01, 500, 1e-4)
    assert list(cfg.INPUT.MIN_SIZE_TRAIN) == ([480, 800] if depth == 101 else [800])
    assert (node.NUM_CONVS, node.NUM_BINS, node.NORM, node.ANCHOR_SCALE, node.CANDIDATES_PER_LEVEL) == (
        4, 17, "GN", 8.0, 9,
    )  # fmt: skip
    assert (node.QUALITY_FOCAL_LOSS_BETA, node.BOX_LOSS_WEIGHT, node.DISTRIBUTION_LOSS_WEIGHT) == (2.0, 2.0, 0.25)
    assert (node.SCORE_THRESH_TEST, node.NMS_THRESH_TEST, node.TOPK_CANDIDATES_TEST) == (0.05, 0.6, 1000)
    if "LD" in name:
        assert (cfg.DISTILL.LD.TEMPERATURE, cfg.DISTILL.LD.CLASS_WEIGHT) == (10.0, 0.0)
    if "CrossKD" in name:
        assert (cfg.DISTILL.CROSS_KD.BOX_LOSS, cfg.DISTILL.CROSS_KD.BOX_WEIGHT) == ("kl", 4.0)
    assert cfg.DISTILL.INIT_FROM_TEACHER.ENABLED == (not cfg.DISTILL.TEACHER.CONFIG_FILE)
