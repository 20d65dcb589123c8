"""Positions weighted by the objects there, and FeatureMimic under such weights."""

import math

import pytest
import torch
from helpers import tap_pair
from models import RETINANET, batch, config, write_teacher

from d2kd.distillers import FeatureMimic
from d2kd.errors import ConfigError
from d2kd.layers import object_weights
from d2kd.modeling import build_distilled_model
from detectron2.utils.events import EventStorage

BOXES = [
    torch.tensor(
        [[3.0, 5.0, 20.0, 17.0], [8.0, 8.0, 16.0, 16.0], [30.0, 0.0, 31.0, 90.0]]
    ),  # two overlap, one sticks out
    torch.zeros(0, 4),
]


def by_hand(boxes, h, w, stride, share, valid=None):
    weights = torch.zeros(h, w)
    known = torch.ones(h, w, dtype=torch.bool) if valid is None else valid
    objects, background = [], {(y, x) for y in range(h) for x in range(w)}
    for x0, y0, x1, y1 in boxes.tolist():
        down = range(max(0, math.floor(y0 / stride)), min(h, math.ceil(y1 / stride)))
        across = range(max(0, math.floor(x0 / stride)), min(w, math.ceil(x1 / stride)))
        cells = [(y, x) for y in down for x in across]
        background -= set(cells)
        objects.append([cell for cell in cells if known[cell]])
    parts = [(cells, share / len(objects)) for cells in objects]
    parts.append(([cell for cell in background if known[cell]], 1 - share if objects else 1.0))
    for cells, of_all in parts:
        for cell in cells:
            weights[cell] += of_all / len(cells)
    return weights / max(weights.sum().item(), 1e-30)


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_weights_are_those_of_the_masks(share, masked):
    valid = torch.rand(2, 9, 8, generator=torch.Generator().manual_seed(0)) > 0.3 if masked else None
    got = object_weights(BOXES, (9, 8), 4, share, valid)
    for i in range(2):
        want = by_hand(BOXES[i], 9, 8, 4, share, None if valid is None else valid[i])
        assert torch.allclose(got[i], want, atol=1e-6)
    assert got.sum((1, 2)).tolist() == pytest.approx([1, 1])
    assert not object_weights(BOXES, (9, 8), 4, share, torch.zeros(2, 9, 8, dtype=torch.bool)).any()


def test_an_image_that_is_one_object():
    outside = torch.tensor([[4.0, 4, 4, 9], [99, 99, 120, 120]])
    for share in (0.25, 1.0):  # boxes without area, or outside, are no objects
        got = object_weights([outside, torch.cat([outside, BOXES[0][:1]])], (9, 8), 4, share)
        assert torch.allclose(got[0], torch.full((9, 8), 1 / 72))
        assert torch.equal(got[1], object_weights([BOXES[0][:1]], (9, 8), 4, share)[0])
    got = object_weights([torch.tensor([[-5.0, 0, 99, 99]])], (2, 3), 8, 0.25)
    assert got.flatten().tolist() == pytest.approx([1 / 6] * 6)


@pytest.mark.parametrize("normalize, reduction", [("none", "mean"), ("standardize", "mean"), ("none", "batchmean")])
def test_the_loss_is_a_mean_under_these_weights(normalize, reduction):
    keys = dict(foreground=0.6, weight=1.0, normalize=normalize, reduction=reduction)
    mimic = FeatureMimic(pairs=[tap_pair("p3", channels=(4, 4), strides=(4.0, 4.0))], **keys)
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(2, 4, 9, 8, generator=generator) for _ in range(2))
    mimic.boxes = BOXES
    got = mimic({"p3": s}, {"p3": t})["p3"].item()
    if normalize == "standardize":
        s, t = ((x - x.mean((0, 2, 3), True)) / x.var((0, 2, 3), False, keepdim=True).sqrt() for x in (s, t))
    weights = torch.stack([by_hand(boxes, 9, 8, 4, 0.6) for boxes in BOXES])
    want = ((s - t).square().mean(1) * weights).sum().item() / 2 * (4 * 9 * 8 if reduction == "batchmean" else 1)
    assert got == pytest.approx(want, rel=1e-4)


def test_without_boxes_it_says_so():
    mimic = FeatureMimic(pairs=[tap_pair("p3", channels=(4, 4), strides=(4.0, 4.0))], foreground=0.5)
    with pytest.raises(ConfigError, match=r"FEATURE_MIMIC\.FOREGROUND is 0\.5, and the images have no boxes"):
        mimic({"p3": torch.randn(1, 4, 3, 3)}, {"p3": torch.randn(1, 4, 3, 3)})


def test_boxes_of_the_images_reach_the_method(tmp_path):
    named, seen = write_teacher(tmp_path, config(RETINANET)), []
    net = build_distilled_model(
        config(DISTILL__METHODS=["FeatureMimic"], DISTILL__FEATURE_MIMIC__FOREGROUND=0.5, **named)
    ).train()
    mimic = net.distillers["FeatureMimic"]
    plain = mimic.level_loss
    mimic.level_loss = lambda *a, **k: (seen.append(mimic.boxes), plain(*a, **k))[1]
    images = batch()
    images[1]["instances"] = images[1]["instances"][:0]
    with EventStorage():
        losses = net(images)
    assert [len(x) for x in seen[0]] == [1, 0] and seen[0][0].tolist() == [[10, 12, 50, 60]] and mimic.boxes is None
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
