"""SOLO: the paper's definitions against literal loops, edge cases, the output, its keys, and distilled runs."""

from typing import Any

import numpy as np
import pytest
import torch
from models import FASTER_RCNN, config, model, write_teacher
from torch import Tensor

from d2kd.engine import load_config
from d2kd.errors import ConfigError
from d2kd.modeling import build_distilled_model, num_classes
from d2kd.modeling.architectures import architecture_of
from d2kd.modeling.init_from_teacher import init_from_teacher
from d2kd.modeling.meta_arch import solo
from d2kd.modeling.meta_arch.solo import decoding
from d2kd.modeling.meta_arch.solo.decoding import Masks, MeasuredMasks, Sizes, Thresholds, detect, tight_boxes
from d2kd.modeling.meta_arch.solo.losses import dice_losses
from d2kd.modeling.meta_arch.solo.matrix_nms import FinalScores, greedy_nms, mask_overlaps, matrix_nms
from d2kd.modeling.meta_arch.solo.targets import Level, Truth, assign_targets, shrink_masks
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

PYRAMID = {key: value for key, value in FASTER_RCNN.items() if "BACKBONE" in key or "RESNETS" in key or "FPN" in key}
SOLO = {
    **PYRAMID,
    "MODEL.META_ARCHITECTURE": "SOLO",
    "MODEL.MASK_ON": True,
    "INPUT.MASK_FORMAT": "bitmask",
    "MODEL.SOLO.NUM_CLASSES": 3,
    "MODEL.SOLO.NUM_GRIDS": [8, 6, 5, 4, 3],
    "MODEL.SOLO.SCALE_RANGES": [[1, 24], [12, 48], [24, 72], [48, 96], [64, 512]],
    "MODEL.SOLO.NUM_CONVS": 1,
    "MODEL.SOLO.CONV_DIM": 32,
}
DECOUPLED = {**SOLO, "MODEL.SOLO.HEAD": "decoupled"}
HEADS = pytest.mark.parametrize("base", [SOLO, DECOUPLED], ids=["plain", "decoupled"])
#: An untrained network has detections too.
ALL = {"MODEL__SOLO__SCORE_THRESH_TEST": -1.0, "MODEL__SOLO__FINAL_SCORE_THRESH_TEST": 0.0}
ALL["MODEL__SOLO__MASK_THRESH_TEST"] = 1e-5


def rectangles(boxes: list[list[int]], size: tuple[int, int]) -> Tensor:
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes):
        mask[y0:y1, x0:x1] = True
    return masks


def example(boxes: list[list[int]], classes: list[int], size: tuple[int, int] = (96, 128), seed: int = 0) -> dict:
    """An image whose instances are rectangles."""
    truth = Instances(size, gt_boxes=Boxes(torch.tensor(boxes).float().reshape(-1, 4)))
    truth.gt_classes = torch.tensor(classes, dtype=torch.int64)
    if boxes:
        truth.gt_masks = BitMasks(rectangles(boxes, size))
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
    return {"image": image, "height": size[0], "width": size[1], "instances": truth}


def batch() -> list[dict]:
    return [
        example([[10, 12, 50, 60], [60, 20, 100, 90]], [1, 0]),
        example([[5, 5, 25, 21]], [2], size=(128, 80), seed=1),
    ]


def losses(net: torch.nn.Module, inputs: list[dict] | None = None) -> dict[str, Tensor]:
    with EventStorage():
        return net.train()(inputs if inputs is not None else batch())


# ---- targets ----


def literal_targets(truth: Truth, level: Level, num_classes: int, center: float) -> tuple[np.ndarray, np.ndarray]:
    """Classes and instances (-1: none) of the cells, one instance and one cell after the other."""
    grid = level.grid
    classes, owner = np.full((grid, grid), num_classes), np.full((grid, grid), -1)
    for number, (label, box, mask) in enumerate(zip(truth.classes, truth.boxes.double(), truth.masks.numpy())):
        width, height = (box[2] - box[0]).item(), (box[3] - box[1]).item()
        if not mask.any() or not level.scales[0] <= (width * height) ** 0.5 <= level.scales[1]:
            continue
        bounds = []
        for positions, side, extent in zip(mask.nonzero(), (height, width), mask.shape):
            middle, half = positions.mean(), 0.5 * center * side
            cell, low, high = (int(v / extent / (1 / grid)) for v in (middle, middle - half, middle + half))
            bounds.append((max(low, cell - 1, 0), min(high, cell + 1, grid - 1)))
        for row in range(bounds[0][0], bounds[0][1] + 1):
            for column in range(bounds[1][0], bounds[1][1] + 1):
                classes[row, column], owner[row, column] = label, number
    return classes, owner


def random_truth(seed: int) -> Truth:
    """Instances of all sizes: rectangles of one pixel to the whole image, empty ones, duplicates."""
    random = np.random.default_rng(seed)
    corners = random.integers(0, [[127, 95]], (14, 2))
    sides = random.integers(1, [[70, 60]], (14, 2))
    boxes = np.concatenate([corners, np.minimum(corners + sides, [128, 96])], axis=1)
    boxes[0] = [0, 0, 128, 96]
    boxes[1, 2:] = boxes[1, :2] + 1
    boxes[3] = boxes[2]
    masks = rectangles(boxes.tolist(), (96, 128)) & torch.from_numpy(random.random((14, 96, 128)) < 0.7)
    masks[4] = False
    return Truth(torch.from_numpy(random.integers(0, 3, 14)), torch.from_numpy(boxes).float(), masks)


@pytest.mark.parametrize("seed", range(4))
def test_targets_are_those_of_a_literal_loop(seed):
    truth = random_truth(seed)
    levels = [Level(40, (1, 64), 8), Level(7, (16, 96), 8), Level(3, (1, 500), 16)]
    sizes = [(24, 32), (24, 32), (12, 16)]
    for center in (0.2, 1.0):
        for level, size, found in zip(levels, sizes, assign_targets(truth, levels, sizes, 3, center)):
            classes, owner = literal_targets(truth, level, 3, center)
            np.testing.assert_array_equal(found.classes, classes)
            cells = (owner.ravel() >= 0).nonzero()[0]
            np.testing.assert_array_equal(found.cells, cells)
            masks = shrink_masks(truth.masks, level.stride // 2, size)
            assert torch.equal(found.masks, masks[owner.ravel()[cells]])


@pytest.mark.parametrize("factor, size", [(2, (10, 9)), (4, (5, 4)), (8, (3, 3)), (4, (2, 6))])
def test_masks_are_shrunk_by_their_central_pixels(factor, size):
    masks = torch.rand(3, 20, 18, generator=torch.Generator().manual_seed(0)) < 0.5
    found = shrink_masks(masks, factor, size)
    padded = torch.zeros(3, max(20, size[0] * factor), max(18, size[1] * factor), dtype=torch.bool)
    padded[:, :20, :18] = masks
    for mask, shrunk in zip(padded, found):
        for y in range(size[0]):
            for x in range(size[1]):
                top, left = y * factor + factor // 2 - 1, x * factor + factor // 2 - 1
                assert shrunk[y, x] == (mask[top : top + 2, left : left + 2].sum() >= 2)
    assert found.any() and not found.all()


def test_two_instances_in_one_cell_the_later_one_gets_it():
    boxes = [[40, 40, 52, 52], [41, 41, 51, 51]]
    truth = Truth(torch.tensor([2, 0]), torch.tensor(boxes).float(), rectangles(boxes, (96, 128)))
    for order in ([0, 1], [1, 0]):
        swapped = Truth(*(x[order] for x in truth))
        (found,) = assign_targets(swapped, [Level(4, (1, 96), 8)], [(24, 32)], 3)
        assert found.cells.tolist() == [5] and found.classes.view(-1)[5] == swapped.classes[1]
        assert torch.equal(found.masks[0], shrink_masks(swapped.masks[1:], 4, (24, 32))[0])


def test_an_instance_of_one_pixel_is_learned_by_its_cell():
    truth = Truth(
        torch.tensor([1]), torch.tensor([[33.0, 50.0, 34.0, 51.0]]), rectangles([[33, 50, 34, 51]], (96, 128))
    )
    (found,) = assign_targets(truth, [Level(40, (1, 96), 8)], [(24, 32)], 3)
    assert found.cells.tolist() == [int(50 / 96 * 40) * 40 + int(33 / 128 * 40)] and not found.masks.any()
    assert torch.isfinite(dice_losses(torch.rand(1, 24, 32), found.masks)).all()


# ---- losses ----


def test_dice_loss_of_the_paper():
    p = torch.rand(2, 4, 5, dtype=torch.double)
    t = torch.rand(2, 4, 5) < 0.5
    for found, q, target in zip(dice_losses(p, t), p, t.double()):
        coefficient = 2 * (q * target).sum() / ((q * q).sum() + (target * target).sum() + 0.002)
        assert found.item() == pytest.approx(1 - coefficient.item(), rel=1e-12)


@HEADS
@pytest.mark.parametrize("inputs", ["no instances", "no masks in a level", "empty masks"])
def test_losses_without_instances_are_connected_to_all_parameters(base, inputs):
    net = model(config(base))
    images = {
        "no instances": [example([], []), example([], [])],
        "no masks in a level": [example([[10, 10, 14, 14]], [1])],
        "empty masks": [example([[10, 10, 40, 50]], [1])],
    }[inputs]
    if inputs == "empty masks":
        images[0]["instances"].gt_masks.tensor[:] = False
    found = losses(net, images)
    assert (found["loss_mask"] == 0) == (inputs != "no masks in a level") and found["loss_cls"] > 0
    sum(found.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters() if p.requires_grad)


def test_polygons_and_bitmaps_teach_the_same():
    net = model(config(SOLO))
    polygons = [[np.array([10.0, 12, 50, 12, 50, 60, 10, 60])], [np.array([60.0, 20, 100, 30, 80, 90])]]
    found = []
    for masks in (PolygonMasks(polygons), BitMasks.from_polygon_masks(polygons, 96, 128)):
        inputs = [example([[10, 12, 50, 60], [60, 20, 100, 90]], [1, 0])]
        inputs[0]["instances"].gt_masks = masks
        found.append(losses(net, inputs))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@HEADS
def test_losses_do_not_depend_on_how_images_are_batched(base):
    """Sums over cells are divided by those of the batch; padding teaches background only."""
    net = model(config(base, MODEL__RESNETS__NORM="FrozenBN"))
    one, two = (example([[10, 12, 50, 60]], [1], seed=i) for i in (0, 1))
    both, alone = losses(net, [one, two]), [losses(net, [x]) for x in (one, two)]
    mean = sum(x["loss_mask"] for x in alone) / 2
    torch.testing.assert_close(both["loss_mask"], mean, rtol=1e-5, atol=0)


def test_instances_without_masks_and_classes_out_of_range_are_errors():
    net = model(config(SOLO))
    inputs = batch()
    inputs[0]["instances"].remove("gt_masks")
    with pytest.raises(ConfigError, match=r"a\.png have none: set MODEL\.MASK_ON True"):
        losses(net, [{**inputs[0], "file_name": "a.png"}])
    with pytest.raises(ConfigError, match=r"b\.png has the class 3, and MODEL\.SOLO\.NUM_CLASSES is 3"):
        losses(net, [{**example([[1, 1, 9, 9]], [3]), "file_name": "b.png"}])


@HEADS
def test_mixed_precision(base):
    net = model(config(base))
    exact = losses(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = losses(net)
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact[name].item(), rel=0.02)
    sum(found.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert len(model(config(base, **ALL)).eval()(batch())[0]["instances"]) > 10


# ---- duplicates ----


def some_masks(seed: int, count: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Overlapping masks with classes and descending scores; the first ones come thrice."""
    random = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 20, (count, 2), generator=random)
    sides = torch.randint(4, 20, (count, 2), generator=random)
    masks = rectangles(torch.cat([corners, corners + sides], dim=1).tolist(), (40, 40))
    masks[7], masks[12] = masks[3], masks[3]
    classes = torch.randint(0, 2, (count,), generator=random)
    classes[7], classes[12] = classes[3], classes[3]
    scores = torch.rand(count, generator=random, dtype=torch.double).sort(descending=True)[0]
    return masks, classes, scores


def literal_iou(a: Tensor, b: Tensor) -> float:
    return ((a & b).sum() / (a | b).sum().clamp(min=1)).item()


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
@pytest.mark.parametrize("seed", range(3))
def test_matrix_nms_is_that_of_a_literal_loop(kernel, seed):
    masks, classes, scores = some_masks(seed)

    def overlap(i: int, j: int) -> float:
        return literal_iou(masks[i], masks[j]) if i < j and classes[i] == classes[j] else 0.0

    expected = []
    for j in range(len(masks)):
        decay = 1.0
        for i in range(j):
            own = max((overlap(k, i) for k in range(i)), default=0.0)
            if kernel == "gaussian":
                decay = min(decay, np.exp(-2 * overlap(i, j) ** 2) / np.exp(-2 * own**2))
            elif own < 1:
                decay = min(decay, (1 - overlap(i, j)) / (1 - own))
        expected.append(scores[j].item() * decay)
    lowered, kept = matrix_nms(mask_overlaps(masks, torch.double), classes, scores, kernel, 2.0, FinalScores(0.0, 100))
    assert torch.isfinite(lowered).all() and torch.equal(kept.sort()[0], torch.arange(len(masks)))
    np.testing.assert_allclose(lowered, np.array(expected)[kept], atol=1e-6)  # overlaps come from float32
    assert torch.equal(lowered, lowered.sort(descending=True)[0])


@pytest.mark.parametrize("seed", range(3))
def test_greedy_nms_is_that_of_a_literal_loop(seed):
    masks, classes, scores = some_masks(seed, count=40)
    expected: list[int] = []
    for j in range(len(masks)):
        if all(classes[i] != classes[j] or literal_iou(masks[i], masks[j]) <= 0.31 for i in expected):
            expected.append(j)
    overlaps = mask_overlaps(masks)
    assert greedy_nms(overlaps, classes, scores, 0.31)[1].tolist() == expected and len(expected) < 30
    least = scores[expected[4]].item()
    assert greedy_nms(overlaps, classes, scores, 0.31, FinalScores(least, 3))[1].tolist() == expected[:3]


def test_identical_masks_of_other_classes_stay():
    mask = rectangles([[2, 2, 9, 9]], (12, 12)).expand(3, 12, 12)
    classes, scores = torch.tensor([0, 1, 0]), torch.tensor([0.9, 0.8, 0.7])
    overlaps = mask_overlaps(mask)
    assert torch.equal(overlaps, torch.ones(3, 3))
    assert matrix_nms(overlaps, classes, scores, "linear")[0].tolist() == pytest.approx([0.9, 0.8, 0.0])
    assert greedy_nms(overlaps, classes, scores)[1].tolist() == [0, 1]


def test_nothing_to_suppress():
    nothing = torch.zeros(0, 4, 4, dtype=torch.bool)
    for suppress in (matrix_nms, greedy_nms):
        scores, kept = suppress(mask_overlaps(nothing), torch.zeros(0).long(), torch.zeros(0))
        assert len(scores) == len(kept) == 0
    assert torch.equal(mask_overlaps(torch.zeros(2, 4, 4, dtype=torch.bool)), torch.zeros(2, 2))


# ---- detections ----


@HEADS
def test_detections_have_the_size_and_boxes_of_the_image(base):
    net = model(config(base, **ALL, TEST__DETECTIONS_PER_IMAGE=7)).eval()
    inputs = [{**x, "height": 200, "width": 150} for x in batch()]
    with torch.no_grad():
        outputs = net(inputs)
    for output in outputs:
        found = output["instances"]
        assert found.image_size == (200, 150) and len(found) == 7
        assert found.pred_masks.shape == (7, 200, 150) and found.pred_masks.dtype == torch.bool
        assert torch.equal(found.pred_boxes.tensor, BitMasks(found.pred_masks).get_bounding_boxes().tensor)
        assert torch.equal(found.scores, found.scores.sort(descending=True)[0])
        assert found.pred_classes.dtype == torch.int64 and found.pred_classes.max() < 3


def test_tight_boxes_of_masks():
    masks = rectangles([[3, 4, 9, 6], [0, 0, 1, 1], [5, 5, 5, 5]], (8, 10))
    assert tight_boxes(masks).tolist() == [[3, 4, 9, 6], [0, 0, 1, 1], [0, 0, 0, 0]]
    assert tight_boxes(masks[:0]).shape == (0, 4)


@HEADS
def test_an_untrained_network_finds_nothing(base):
    found = model(config(base)).eval()(batch())[0]["instances"]
    assert len(found) == 0 and found.pred_masks.shape == (0, 96, 128) and found.pred_boxes.tensor.shape == (0, 4)


@HEADS
def test_memory_is_bounded_without_a_change_of_the_result(base, monkeypatch):
    net = model(config(base, **ALL, TEST__DETECTIONS_PER_IMAGE=30)).eval()
    with torch.no_grad():
        whole = net(batch())[0]["instances"]
        largest = []
        plain = net.head.cell_masks
        monkeypatch.setattr(net.head, "cell_masks", lambda *a: largest.append(len(a[3])) or plain(*a))
        for module in (decoding, solo.matrix_nms):
            monkeypatch.setattr(module, "_CHUNK", 5 * 32 * 32)
        monkeypatch.setattr(decoding, "_KEPT", 100 * 32 * 32)
        parts = net(batch())[0]["instances"]
    assert max(largest) == 5
    assert torch.equal(whole.pred_masks, parts.pred_masks)
    torch.testing.assert_close(whole.scores, parts.scores, rtol=1e-5, atol=0)


@HEADS
def test_masks_of_some_cells_are_those_of_all(base):
    net = model(config(base)).eval()
    images = net.preprocess_image(batch())
    features = net.backbone(images.tensor)
    maps = net.head([features[name] for name in net.head_in_features])[1]
    cells = torch.tensor([0, 7, 8, 30])
    everything = net.head.cell_masks(0, maps[0], 1, torch.arange(64))
    torch.testing.assert_close(net.head.cell_masks(0, maps[0], 1, cells), everything[cells])
    several = torch.cat([cells, torch.tensor([64, 99, 100 + 20])])  # of the first three levels
    found = Masks(net.head, maps, 1, (32, 32)).soft(several)
    torch.testing.assert_close(found[5], net.head.cell_masks(1, maps[1], 1, torch.tensor([35]))[0])
    assert found.shape == (7, 32, 32)


def test_small_masks_and_low_scores_are_no_candidates():
    """Masks of at most the stride's number of pixels are dropped; a score is that of class times that of the mask."""

    class Head:
        grids = [2, 1]

        def cell_masks(self, level: int, maps: Any, image: int, cells: Tensor, size: Any) -> Tensor:
            return maps[cells]

    masks = torch.zeros(4, 8, 8)
    masks[0, :2, :4] = 0.9  # as many pixels as the stride
    masks[1, :3, :3] = 0.8
    masks[2] = 0.4
    masks[3, 4:, 4:] = 0.6
    scores = [torch.tensor([[[0.9, 0.5], [0.9, 0.09]], [[0.0, 0.4], [0.0, 0.0]]]), torch.zeros(2, 1, 1)]
    sizes = Sizes((8, 8), (30, 31), (30, 31))
    found = detect(scores, Masks(Head(), [masks, masks], 0, (8, 8)), [8, 8], sizes, Thresholds())
    assert found.scores.tolist() == pytest.approx([0.5 * 0.8, 0.4 * 0.8]) and found.pred_classes.tolist() == [0, 1]
    assert torch.equal(found.pred_masks[0], found.pred_masks[1]) and found.pred_masks.shape[1:] == (30, 31)


# ---- keys ----


def test_keys_are_read():
    keys = {
        "HEAD": "decoupled", "CENTER_SCALE": 0.4, "MASK_LOSS_WEIGHT": 2.0, "FOCAL_LOSS_ALPHA": 0.3, "NUM_CONVS": 2,
        "FOCAL_LOSS_GAMMA": 1.0, "PRIOR_PROB": 0.5, "NORM": "", "SCORE_THRESH_TEST": 0.2, "MASK_THRESH_TEST": 0.4,
        "NMS": "mask", "NMS_SIGMA": 1.0, "NMS_THRESH_TEST": 0.6, "TOPK_CANDIDATES_TEST": 7,
        "FINAL_SCORE_THRESH_TEST": 0.1, "IN_FEATURES": ["p2", "p3", "p4"], "NUM_GRIDS": [5, 4, 3],
        "SCALE_RANGES": [[1, 10], [2, 20], [3, 30]],
    }  # fmt: skip
    cfg = config(SOLO, **{f"MODEL__SOLO__{key}": value for key, value in keys.items()}, TEST__DETECTIONS_PER_IMAGE=9)
    net = model(cfg)
    assert net.thresholds == Thresholds(0.2, 0.4, "mask", 1.0, 0.6, 7, 0.1, 9)
    assert net.levels == [Level(5, (1, 10), 8), Level(4, (2, 20), 8), Level(3, (3, 30), 8)]
    assert (net.center_scale, net.mask_loss_weight, net.focal_loss_alpha, net.focal_loss_gamma) == (0.4, 2.0, 0.3, 1.0)
    assert isinstance(net.head, solo.DecoupledSOLOHead) and len(net.head.mask_tower_x) == 2
    assert not net.head.cls_score.bias.any() and not any(isinstance(m, torch.nn.GroupNorm) for m in net.modules())
    assert num_classes(cfg) == ("MODEL.SOLO.NUM_CLASSES", 3)
    assert all(torch.isfinite(value) for value in losses(net).values())


def test_initial_values_are_the_published_ones():
    head = model(config(SOLO, MODEL__SOLO__NUM_CONVS=2)).head
    assert head.cls_tower[1].weight.std().item() == pytest.approx(0.01, rel=0.1)
    for layer in (head.cls_score, *head.mask_pred):
        assert torch.allclose(layer.bias, torch.tensor(-np.log(99.0), dtype=torch.float32))
    assert head.mask_tower[0].bias is None and head.mask_tower[0].weight.shape[1] == 8 + 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"NUM_GRIDS": [8, 6]}, r"MODEL\.SOLO\.NUM_GRIDS has 2 entries for 5 levels"),
        ({"SCALE_RANGES": [[1, 9]]}, r"MODEL\.SOLO\.SCALE_RANGES has 1 entries for 5 levels"),
        ({"SCALE_RANGES": [[9, 1]] * 5}, r"MODEL\.SOLO\.SCALE_RANGES is .*upper end"),
        ({"CONV_DIM": 40}, r"MODEL\.SOLO\.CONV_DIM is 40; it must be a multiple of 32"),
        ({"IN_FEATURES": ["p2", "p3"]}, r"MODEL\.SOLO\.IN_FEATURES is .*three levels"),
        ({"NMS": "soft"}, r"MODEL\.SOLO\.NMS is 'soft'; it must be one of gaussian, linear, mask"),
        ({"MODEL.MASK_ON": False}, r"MODEL\.MASK_ON is False, and SOLO learns masks"),
        ({"MODEL.KEYPOINT_ON": True}, r"MODEL\.KEYPOINT_ON is True, and SOLO has no such head"),
    ],
)
def test_values_that_cannot_work_name_their_key(changes, message):
    keys = {k if k.startswith("MODEL") else f"MODEL.SOLO.{k}": v for k, v in changes.items()}
    with pytest.raises(ConfigError, match=message):
        load_config("", [x for pair in {**SOLO, **keys}.items() for x in pair])


def test_level_that_is_not_there_is_an_error():
    with pytest.raises(ConfigError, match=r"MODEL\.SOLO\.IN_FEATURES names p7, but the backbone .* p2, p3, p4, p5, p6"):
        model(config(SOLO, MODEL__SOLO__IN_FEATURES=["p2", "p3", "p4", "p5", "p7"]))


# ---- distillation ----


def distilled(directory: Any, base: dict, methods: list[str], teacher: dict | None = None, **changes: Any) -> Any:
    named = write_teacher(directory, config(base, **(teacher or {})))
    return build_distilled_model(config(base, DISTILL__METHODS=methods, **named, **changes)).train()


@HEADS
def test_every_method_finds_its_features(tmp_path, base):
    methods = ["FeatureMimic", "MaskedGenerative", "LogitKD"]
    wider = {"MODEL__RESNETS__RES2_OUT_CHANNELS": 32}
    net = distilled(tmp_path, base, methods, wider, INPUT__MIN_SIZE_TRAIN=[128])
    found = losses(net)
    for method in methods[:2]:
        assert [n.split("/")[2] for n in found if method in n] == ["p2", "p3", "p4", "p5"]
    assert [n.split("/")[2] for n in found if "LogitKD" in n] == [f"head.cls_score@{i}" for i in range(5)]
    sum(found.values()).backward()
    gradients = [p.grad for p in net.student.parameters() if p.requires_grad]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    report = init_from_teacher(net.student, net.teacher.model)
    assert {f"head.{name}" for name in net.student.head.state_dict()} <= set(report.copied)
    assert any(layer.path == "head.cls_score" for layer in architecture_of(net.student).class_layers())


def test_logits_of_other_grids_are_an_error(tmp_path):
    with pytest.raises(
        ValueError, match=r"cells along a side of the grid \(MODEL\.SOLO\.NUM_GRIDS\), but have 8 and 9"
    ):
        distilled(tmp_path, SOLO, ["LogitKD"], {"MODEL__SOLO__NUM_GRIDS": [9, 6, 5, 4, 3]})


def test_there_are_no_boxes_to_regress(tmp_path):
    with pytest.raises(
        ValueError, match=r"DISTILL\.HEAD_REGRESSION\.TAPS is empty, and a SOLO and a SOLO make no box_d"
    ):
        distilled(tmp_path, SOLO, ["HeadRegression"])


def test_masks_that_are_too_many_to_keep_and_none_of_them_wanted():
    masks, none = object.__new__(Masks), torch.zeros(0)
    masks.size = (6, 7)
    measured = MeasuredMasks(torch.arange(3), none, none, None)
    assert masks.binary(torch.zeros(0, dtype=torch.int64), 0.5, measured).shape == (0, 6, 7)
