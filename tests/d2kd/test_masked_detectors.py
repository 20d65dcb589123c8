"""MaskedTeacher in detectors: which patches it computes, what students it watches, and what it gives."""

from types import SimpleNamespace

import pytest
import torch
from models import FASTER_RCNN, NARROW, RETINANET, batch, config, write_teacher
from test_fcos_vit import VIT_RCNN

from d2kd.errors import ConfigError
from d2kd.modeling import build_distilled_model
from d2kd.modeling.teacher_passes.saliency import (
    EvidenceSaliency,
    MagnitudeSaliency,
    RankedSaliency,
    ReceivedAttention,
)
from d2kd.modeling.teacher_passes.selection import Selection, patches_of_objects, select, valid_patches
from d2kd.modeling.teacher_passes.sparse_vit import position_bias, vit_of
from detectron2.utils.events import EventStorage

STUDENTS = {"RetinaNet": RETINANET, "FasterRCNN": FASTER_RCNN, "ViT": VIT_RCNN}


def distilled(tmp_path, student="RetinaNet", teacher=None, **changes):
    tap = "last_feat" if student == "ViT" else "res4"
    keys = {
        "DISTILL__METHODS": ["FeatureMimic"],
        "DISTILL__FEATURE_MIMIC__TAPS": [tap],
        "DISTILL__FEATURE_MIMIC__TEACHER_TAPS": ["last_feat"],
        "DISTILL__FEATURE_MIMIC__TEACHER_PASS": "MaskedTeacher",
        **changes,
    }
    named = write_teacher(tmp_path, config(VIT_RCNN, **(teacher or {})))
    return build_distilled_model(config(STUDENTS[student], **named, **keys)).train()


def step(net, inputs=None):
    with EventStorage():
        losses = net(inputs or batch())
    sum(losses.values()).backward()
    return losses


def features(net, inputs):
    """What the pass gives for a batch."""
    masked = net.passes.others["MaskedTeacher"]
    with EventStorage(), masked.watch() as guidance:
        net.student(inputs)
    return masked(inputs, guidance, {})


@pytest.mark.parametrize(
    "student, saliency",
    [("RetinaNet", EvidenceSaliency), ("FasterRCNN", EvidenceSaliency), ("ViT", ReceivedAttention)],
)
def test_students_of_every_kind_steer_the_teacher(tmp_path, student, saliency):
    net = distilled(tmp_path, student)
    assert isinstance(net.passes.others["MaskedTeacher"].saliency, saliency)
    ran = []
    for name in ("proposal_generator", "roi_heads"):
        getattr(net.teacher.model, name).register_forward_pre_hook(lambda m, args, name=name: ran.append(name))
    net.teacher.model.backbone.register_forward_pre_hook(lambda m, args: ran.append("backbone"))
    losses = step(net)
    assert not ran  # neither neck nor heads, nor the transformer over all patches
    (loss,) = [loss for name, loss in losses.items() if name.startswith("distill/")]
    assert loss.isfinite() and loss > 0
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.student.backbone.parameters())


def test_half_of_the_patches_with_pixels_are_computed_and_the_map_says_where(tmp_path):
    net, inputs = distilled(tmp_path), batch()
    found = features(net, inputs)
    maps, valid = found.maps["last_feat"], found.valid["last_feat"]
    assert valid.shape == (2, 8, 8)  # images are padded to squares of 128 pixels
    assert valid.flatten(1).sum(1).tolist() == [20, 20]  # of 6 x 8 and 8 x 5 with pixels, half of the fewer
    assert not valid[0, 6:].any() and not valid[1, :, 5:].any()
    with torch.no_grad():
        model = net.teacher.model
        whole = vit_of(model)(model.preprocess_image(net.teacher.prepare(inputs)).tensor)["last_feat"]
    assert (maps.abs().sum(1) > 0).eq(valid).all()
    # it is near the whole network's map, though others are hidden from it
    mine, theirs = maps.transpose(0, 1)[:, valid], whole.transpose(0, 1)[:, valid]
    assert torch.cosine_similarity(mine, theirs, dim=0).mean() > 0.9


def test_all_patches_give_the_whole_map(tmp_path):
    net, inputs = distilled(tmp_path, DISTILL__MASKED_TEACHER__KEEP=64), batch([(128, 128), (128, 128)])
    found = features(net, inputs)
    with torch.no_grad():
        model = net.teacher.model
        whole = vit_of(model)(model.preprocess_image(net.teacher.prepare(inputs)).tensor)["last_feat"]
    assert found.valid["last_feat"].all() and torch.allclose(found.maps["last_feat"], whole, atol=1e-4)


def test_late_blocks_see_everything(tmp_path):
    inputs = batch([(128, 128), (128, 128)])
    with torch.no_grad():
        drift = []
        for late in (0, 3):
            net = distilled(tmp_path, DISTILL__MASKED_TEACHER__LATE_BLOCKS=late)
            found, model = features(net, inputs), net.teacher.model
            whole = vit_of(model)(model.preprocess_image(net.teacher.prepare(inputs)).tensor)["last_feat"]
            valid = found.valid["last_feat"]
            drift.append((found.maps["last_feat"] - whole).transpose(0, 1)[:, valid].abs().mean().item())
    assert drift[1] < drift[0]


def test_random_and_explored_patches_continue_after_a_resume(tmp_path):
    for changes in ({"DISTILL__MASKED_TEACHER__SELECTOR": "random"}, {"DISTILL__MASKED_TEACHER__EXPLORE": 0.5}):
        net = distilled(tmp_path, **changes)
        state = net.passes.state_dict()
        first, second = (features(net, batch()).valid["last_feat"] for _ in range(2))
        assert state and not torch.equal(first, second)
        net.passes.load_state_dict(state)
        assert torch.equal(features(net, batch()).valid["last_feat"], first)
    assert not distilled(tmp_path).passes.state_dict()


def test_patches_of_objects_are_kept_first(tmp_path):
    net = distilled(tmp_path, DISTILL__MASKED_TEACHER__MUST_KEEP=True, DISTILL__MASKED_TEACHER__KEEP=10)
    valid = features(net, batch()).valid["last_feat"]
    # the box of both images, 10 to 50 and 12 to 60 pixels, and the patches around it
    assert (valid[:, :5, :5].flatten(1).sum(1) >= 5).all()
    assert valid.flatten(1).sum(1).tolist() == [10, 10]


def test_received_attention_is_that_of_the_last_global_block(golden):
    recorded = golden("maskedkd_vitdet_oracle")
    from test_sparse_vit import recorded_network

    made = recorded_network(recorded)
    saliency = ReceivedAttention(made)
    with saliency.watch() as seen, torch.no_grad():
        made(recorded["image"])
    scores, stride = saliency(seen)
    assert stride == float(recorded["patch"])
    assert torch.allclose(scores.flatten(1), recorded["saliency_attention_received"], atol=1e-5)
    kept = select(Selection(keep=28), scores, torch.ones_like(scores, dtype=torch.bool))
    assert torch.equal(kept, recorded["kept_sorted"].long())


def test_attention_is_received_from_the_patches_of_the_image_alone(golden):
    recorded = golden("maskedkd_vitdet_oracle")
    from test_sparse_vit import recorded_network

    made, sizes = recorded_network(recorded), [(20, 30), (28, 13)]
    image = torch.rand(2, *recorded["image"].shape[1:], generator=torch.Generator().manual_seed(1))
    stride = int(recorded["patch"])
    grid = tuple(n // stride for n in image.shape[-2:])
    saliency, block = ReceivedAttention(made), [b for b in made.blocks if not b.window_size][-1]
    with saliency.watch() as seen, torch.no_grad():
        made(image)
        # every row of the attention, by the block's own terms
        n, rows, columns, _ = seen["x"].shape
        query, key, _ = seen["qkv"].reshape(n, rows * columns, 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        logits = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
        if block.attn.use_rel_pos:
            everywhere = torch.arange(rows * columns)
            places = torch.stack([everywhere // columns, everywhere % columns], -1).expand(n, -1, -1)
            logits += position_bias(block.attn, query, places, places, (rows, columns))
        attention = logits.softmax(-1).mean(1)
    # one size at a time: with both, as many queries are taken of each as the smaller one has
    for i, size in enumerate(sizes):
        one = {name: value.unflatten(0, (n, -1))[i] for name, value in seen.items()}
        scores, _ = saliency(one, [size])
        valid = valid_patches([size], grid, stride, "cpu").flatten()
        assert 0 < valid.sum() < len(valid)
        assert torch.allclose(scores[0].flatten(), attention[i, valid].mean(0), atol=1e-6)


def test_an_rcnn_looks_where_its_proposals_are(tmp_path):
    net = distilled(tmp_path, "FasterRCNN")
    saliency = net.passes.others["MaskedTeacher"].saliency
    head = net.student.proposal_generator.rpn_head
    seen = []
    head.objectness_logits.register_forward_hook(lambda m, args, out: seen.append(out.detach()))
    with EventStorage(), saliency.watch() as guidance:
        net.student(batch())
    scores, stride = saliency(guidance)
    assert stride == net.student.backbone.output_shape()[net.student.proposal_generator.in_features[0]].stride
    assert torch.allclose(scores.amax((1, 2)), torch.stack([x.sigmoid().amax((1, 2, 3)) for x in seen]).amax(0))


def test_both_is_the_mean_of_the_ranks(tmp_path):
    net = distilled(tmp_path, DISTILL__MASKED_TEACHER__SALIENCY="both")
    saliency = net.passes.others["MaskedTeacher"].saliency
    assert isinstance(saliency, RankedSaliency)
    assert isinstance(saliency.first, EvidenceSaliency) and isinstance(saliency.second, MagnitudeSaliency)
    step(net)
    one, two = torch.tensor([[[0.1, 0.9], [0.5, 0.2]]]), torch.tensor([[[1e6, 0.0], [0.0, 3.0]]])
    saliency.first = saliency.second = lambda seen, sizes: (seen, 16.0)
    scores, stride = saliency((one, two))
    # ranks of 1 to 4, over 5: equal ones by their places
    assert torch.allclose(scores, torch.tensor([[[1 + 4, 4 + 1], [3 + 2, 2 + 3]]]) / 10) and stride == 16
    assert isinstance(
        distilled(tmp_path, "ViT", DISTILL__MASKED_TEACHER__SALIENCY="both")
        .passes.others["MaskedTeacher"]
        .saliency.second,
        ReceivedAttention,
    )


# ---- segmentors ----

SEMANTIC = {
    **NARROW,
    "MODEL.META_ARCHITECTURE": "SemanticSegmentor",
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 5,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
}
LINEAR_SEGMENTOR = {
    **{key: value for key, value in VIT_RCNN.items() if key.startswith("MODEL.VIT")},
    "MODEL.META_ARCHITECTURE": "SemanticSegmentor",
    "MODEL.BACKBONE.NAME": "build_vit_backbone",
    "MODEL.SEM_SEG_HEAD.NAME": "LinearSemSegHead",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["last_feat"],
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 5,
    "MODEL.SEM_SEG_HEAD.NORM": "LN",
}


def segmentor(tmp_path, form="patch", **changes):
    named = write_teacher(tmp_path, config(LINEAR_SEGMENTOR))
    keys = {"DISTILL__METHODS": ["LogitKD"], "DISTILL__LOGIT_KD__FORM": form, **changes}
    keys = {"DISTILL__LOGIT_KD__TEACHER_PASS": "MaskedTeacher", "DISTILL__INIT_FROM_TEACHER__ENABLED": False, **keys}
    return build_distilled_model(config(SEMANTIC, **named, **keys)).train()


@pytest.mark.parametrize("form", ["patch", "auto", "softmax", "hard"])
def test_a_segmentor_learns_from_the_kept_patches(tmp_path, form):
    net, inputs = segmentor(tmp_path, form), with_labels(batch())
    losses = step(net, inputs)
    (loss,) = [loss for name, loss in losses.items() if name.startswith("distill/")]
    assert loss.isfinite() and loss > 0
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.student.parameters())
    assert isinstance(net.passes.others["MaskedTeacher"].saliency, EvidenceSaliency)  # where it is undecided


def test_the_loss_of_patches_is_that_of_the_means_over_them(tmp_path):
    net, inputs = segmentor(tmp_path), with_labels(batch([(128, 128), (128, 128)]))
    distiller = net.distillers["LogitKD"]
    (pair,) = distiller.pairs
    found = features(net, inputs)
    logits, valid = found.maps[pair.teacher.name], found.valid[pair.teacher.name]
    assert valid.flatten(1).sum(1).tolist() == [32, 32]
    student = torch.randn(2, 5, 32, 32, requires_grad=True)
    loss = distiller({pair.student.name: student}, found.maps, found.valid)[pair.student.name]
    total = torch.zeros(())
    for n, y, x in valid.nonzero().tolist():
        ours = student[n, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].softmax(0).mean((1, 2))
        theirs = logits[n, :, y, x].softmax(0)
        total = total + (theirs * (theirs.log() - ours.log())).sum()
    assert torch.allclose(loss, total / valid.sum(), rtol=1e-5)
    (gradient,) = torch.autograd.grad(loss, student)
    dropped = ~valid.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert not gradient.abs().sum(1)[dropped].any() and gradient.abs().sum(1)[~dropped].any()


def test_scores_of_kept_patches_are_those_of_the_head(tmp_path):
    net = segmentor(tmp_path, DISTILL__MASKED_TEACHER__KEEP=64)
    inputs = with_labels(batch([(128, 128), (128, 128)]))
    (tap,) = net.passes.others["MaskedTeacher"].taps
    found = features(net, inputs)
    with torch.no_grad():
        model = net.teacher.model
        whole = model.sem_seg_head.layers(model.backbone(model.preprocess_image(net.teacher.prepare(inputs)).tensor))
    assert torch.allclose(found.maps[tap], whole, atol=1e-4)


def test_a_model_that_normalizes_in_its_forward_pass_is_fed_alike(tmp_path, monkeypatch):
    """As Detectron2's SemanticSegmentor."""
    net, inputs = segmentor(tmp_path), with_labels(batch([(128, 128), (96, 128)]))
    chosen, model = net.passes.others["MaskedTeacher"], net.teacher.model
    expected = model.preprocess_image(net.teacher.prepare(inputs))
    names = ("backbone", "device", "pixel_mean", "pixel_std")
    monkeypatch.setattr(chosen.teacher, "model", SimpleNamespace(**{name: getattr(model, name) for name in names}))
    found = chosen._images(inputs)
    assert torch.equal(found.tensor, expected.tensor) and found.image_sizes == expected.image_sizes


def test_a_head_that_sees_neighbours_is_one_line(tmp_path):
    from d2kd.modeling.sem_seg import LinearSemSegHead

    net = segmentor(tmp_path, DISTILL__LOGIT_KD__TEACHER_PASS="auto")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConfigError, match=r"no sem_seg_head.predictor"):
        patch.setattr(LinearSemSegHead, "token_local", False)
        segmentor(tmp_path)
    assert step(net, with_labels(batch()))


def test_a_linear_head_trains_and_labels_images_of_its_own_size(tmp_path):
    from d2kd.modeling import build_network

    model = build_network(config(LINEAR_SEGMENTOR), "student")
    inputs = with_labels(batch())
    loss = model.train()(inputs)["loss_sem_seg"]
    assert loss > 0
    for x in inputs:
        x["sem_seg"] = torch.full_like(x["sem_seg"], 255)
    ignored = model(inputs)["loss_sem_seg"]
    assert ignored == 0 and ignored.requires_grad
    with torch.no_grad():
        for x, found in zip(inputs, model.eval()(inputs)):
            assert found["sem_seg"].shape == (5, x["height"], x["width"])
    for wrong, message in (
        ({"MODEL__SEM_SEG_HEAD__NORM": "GN"}, r"NORM is 'GN'; LinearSemSegHead looks at each place by itself"),
        ({"MODEL__SEM_SEG_HEAD__IN_FEATURES": ["p2"]}, r"IN_FEATURES is \['p2'\]; LinearSemSegHead takes one"),
    ):
        with pytest.raises(Exception, match=message):
            build_network(config(LINEAR_SEGMENTOR, **wrong), "student")


def with_labels(inputs):
    for x in inputs:
        x["sem_seg"] = torch.arange(x["image"][0].numel()).view(x["image"][0].shape) % 5
    return inputs


# ---- selection ----


def test_padding_is_never_kept_and_images_keep_as_many_as_the_smallest_allows():
    valid = valid_patches([(32, 48), (16, 16)], (4, 4), 16, "cpu")
    assert valid[0].sum() == 6 and valid[1].sum() == 1
    scores = torch.rand(2, 4, 4)
    kept = select(Selection(keep=5), scores, valid)
    assert kept.shape == (2, 1) and kept[1].item() == 0
    assert kept[0].item() == scores[0].masked_fill(~valid[0], -1).flatten().argmax()


def test_equal_scores_and_strange_ones_are_no_trouble():
    for scores in (torch.zeros(1, 4, 4), torch.full((1, 4, 4), 1e30), torch.rand(1, 4, 4) * 1e-30):
        kept = select(Selection(keep_ratio=0.25), scores, torch.ones(1, 4, 4, dtype=torch.bool))
        assert kept.shape == (1, 4) and len(set(kept[0].tolist())) == 4


def test_objects_take_half_at_most_and_their_neighbours_count():
    boxes = [torch.tensor([[16.0, 16.0, 47.0, 31.0]])]
    objects = patches_of_objects(boxes, (6, 6), 16)
    assert objects[0].nonzero().tolist() == [[y, x] for y in (0, 1, 2) for x in (0, 1, 2, 3)]
    scores = 1 - objects.float()
    scores[0, 1, 1] = 0.5
    kept = select(Selection(keep=8, must_keep=True), scores, torch.ones_like(objects), objects=objects)
    chosen = torch.zeros(36, dtype=torch.bool).scatter_(0, kept[0], True).view(6, 6)
    assert (chosen & objects[0]).sum() == 4 and chosen[1, 1]
    nothing = patches_of_objects([torch.zeros(0, 4)], (6, 6), 16)
    assert not nothing.any()


def test_explored_patches_are_the_share_that_is_asked_for():
    torch.manual_seed(0)
    scores, random = torch.arange(100.0).view(1, 10, 10), torch.rand(1, 10, 10)
    valid = torch.ones(1, 10, 10, dtype=torch.bool)
    kept = set(select(Selection(keep=20, explore=0.5), scores, valid, random=random)[0].tolist())
    drawn = set(random.flatten().topk(10).indices.tolist())
    assert drawn <= kept and len(kept - set(range(80, 100))) <= 10


def test_every_window_keeps_its_floor():
    scores = torch.zeros(1, 8, 8)
    scores[0, :2, :2] = 1
    kept = select(Selection(keep=20, window_floor=2), scores, torch.ones(1, 8, 8, dtype=torch.bool), window=3)
    chosen = torch.zeros(64, dtype=torch.bool).scatter_(0, kept[0], True).view(8, 8)
    for y in range(0, 8, 3):
        for x in range(0, 8, 3):
            assert chosen[y : y + 3, x : x + 3].sum() >= 2


def test_whole_windows_are_kept_one_after_the_other():
    scores = torch.zeros(1, 9, 9)
    scores[0, 3:6, 6:9] = torch.arange(1.0, 10.0).view(3, 3)
    scores[0, 0:3, 0:3] = 0.5
    kept = select(Selection(keep=18, unit="window"), scores, torch.ones(1, 9, 9, dtype=torch.bool), window=3)
    chosen = torch.zeros(81, dtype=torch.bool).scatter_(0, kept[0], True).view(9, 9)
    assert chosen[3:6, 6:9].all() and chosen[0:3, 0:3].all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"DISTILL__FEATURE_MIMIC__TEACHER_TAPS": ["p4"]}, r"gives last_feat, .*no p4.*TEACHER_TAPS"),
        ({"DISTILL__MASKED_TEACHER__LATE_BLOCKS": 4}, r"LATE_BLOCKS is 4, and the teacher has 4 blocks"),
        ({"DISTILL__METHODS": ["LogitKD"], "DISTILL__LOGIT_KD__TEACHER_PASS": "MaskedTeacher"}, r"."),
        (
            {"teacher": {"MODEL__VIT__WINDOW_BLOCK_INDEXES": []}, "DISTILL__MASKED_TEACHER__UNIT": "window"},
            r"UNIT is window, and the teacher has no windows",
        ),
        ({"teacher": {"MODEL__VIT__RESIDUAL_BLOCK_INDEXES": [1]}}, r"RESIDUAL_BLOCK_INDEXES"),
        ({"DISTILL__MASKED_TEACHER__SALIENCY": "attention"}, r"SALIENCY is attention"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, changes, message):
    with pytest.raises(Exception, match=message) as error:
        distilled(tmp_path, **changes)
    assert isinstance(error.value, ConfigError) or "TapError" in repr(error) and "\n" not in str(error.value)


def test_more_patches_than_there_are_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"KEEP is 65, and the teacher has 64 patches"):
        step(distilled(tmp_path, DISTILL__MASKED_TEACHER__KEEP=65))
