"""MaskedTeacher against values recorded from the official code, its selection, its tokens, and whole steps."""

import pytest
import torch
from helpers import assert_recorded, tap_pair
from torch.nn import functional as F

from d2kd.config import get_key
from d2kd.distillers import LogitKD, Prediction
from d2kd.engine import load_config
from d2kd.errors import ConfigError
from d2kd.layers import attention_saliency, gather_tokens, resample_saliency, scatter_tokens
from d2kd.modeling import Teacher, build_distilled_model, build_network
from d2kd.modeling.backbone import TimmNetwork
from d2kd.modeling.meta_arch import ImageClassifier
from d2kd.modeling.teacher_passes.masked import _MaskedClassifier
from d2kd.modeling.teacher_passes.saliency import AttentionSaliency, MagnitudeSaliency
from d2kd.modeling.teacher_passes.selection import Selection, select

#: timm's network of each recorded one, and what its parameters are called there.
FAMILIES = {
    "deit": ("deit_tiny_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}),
    "cait": ("cait_xxs24_224", {}),
}


def network(family, recorded):
    """timm's network at the recorded sizes, with the recorded weights."""
    name, renamed = FAMILIES[family]
    width = recorded["w.pos_embed"].shape[2]
    depth = len({key.split(".")[2] for key in recorded if key.startswith("w.blocks.")})
    sizes = {"img_size": 40, "patch_size": 8, "embed_dim": width, "num_heads": int(recorded["heads"]), "depth": depth}
    if family == "cait":
        sizes["depth_token_only"] = len({k.split(".")[2] for k in recorded if k.startswith("w.blocks_token_only.")})
    made = TimmNetwork(name, 10, arguments=sizes, sides=[40])
    weights = {key.removeprefix("w."): value for key, value in recorded.items() if key.startswith("w.")}
    for old, new in renamed.items():
        weights = {key.replace(old, new): value for key, value in weights.items()}
    made.net.load_state_dict(weights, strict=True)
    return made


def classifier(backbone):
    arguments = {"head": None, "num_classes": 10, "pixel_mean": [0.0] * 3, "pixel_std": [1.0] * 3}
    return ImageClassifier(backbone=backbone, **arguments).eval()


def inputs(images):
    return [{"image": image} for image in images]


class Given:
    """A saliency that keeps the given patches of 5 x 5, of 8 pixels each."""

    def __init__(self, kept):
        self.scores = torch.zeros(len(kept), 25).scatter_(1, kept, 1.0).view(-1, 5, 5)

    def __call__(self, seen, sizes=None):
        return self.scores, 8.0


def test_recorded_saliency_and_selection(golden):
    recorded = golden("maskedkd_student")
    student = classifier(network("deit", recorded))
    saliency = AttentionSaliency(student.backbone.net)
    with saliency.watch() as seen:
        logits = student.backbone(recorded["image"])["class_logits"]
    scores, stride = saliency(seen)
    assert scores.shape[1:] == (5, 5) and stride == 8
    scores = scores.flatten(1)
    assert_recorded(logits, recorded["logits"])
    assert_recorded(scores, recorded["saliency"])
    keep = int(recorded["keep"])
    kept = select(Selection(keep=keep), scores.view(-1, 5, 5), torch.ones(len(scores), 5, 5, dtype=torch.bool))
    assert torch.equal(kept, recorded["kept_sorted"].long())


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_logits_of_a_masked_teacher(golden, family):
    recorded = golden(f"maskedkd_teacher_{family}")
    teacher, kept = Teacher(classifier(network(family, recorded))), recorded["kept_desc"].long()
    masked = _MaskedClassifier(teacher, ["logits"], Given(kept), Selection(keep=kept.shape[1]))
    assert not masked.sparse
    found = masked(inputs(recorded["image"]), {}, {}).maps["logits"]
    assert_recorded(found, recorded["logits_masked"])
    assert_recorded(found, recorded["logits_masked_sorted_order"])
    whole = _MaskedClassifier(teacher, ["logits"], Given(kept), Selection(keep_ratio=1.0))
    assert_recorded(whole(inputs(recorded["image"]), {}, {}).maps["logits"], recorded["logits_full"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number", range(3))
def test_recorded_losses(golden, family, number):
    recorded = golden(f"maskedkd_teacher_{family}")
    kind, alpha, tau = (recorded[f"loss{number}_{name}"] for name in ("kind", "alpha", "tau"))
    logits = recorded["student_logits"].clone().requires_grad_()
    prediction = Prediction("logits", "class_logits", "image", activation="softmax")
    pair = tap_pair("logits", channels=(10, 10), strides=(0.0, 0.0), prediction=prediction)
    form = "hard" if kind == "hard" else "softmax"
    method = LogitKD(pairs=[pair], weight=float(alpha), temperature=float(tau), form=form)
    task = F.cross_entropy(logits, recorded["soft_label"])
    (term,) = method({"logits": logits}, {"logits": recorded["logits_masked"]}).values()
    loss = (1 - float(alpha)) * task + term
    loss.backward()
    assert_recorded(loss, recorded[f"loss{number}_value"], loss=True)
    assert_recorded(logits.grad, recorded[f"loss{number}_grad_logits"])


# ---- tokens ----


def test_tokens_are_kept_in_their_order_behind_those_before_them():
    tokens = torch.arange(2 * 6, dtype=torch.float).view(2, 6, 1)  # two before four patches
    kept = torch.tensor([[0, 3], [1, 2]])
    assert gather_tokens(tokens, kept, 2)[..., 0].tolist() == [[0, 1, 2, 5], [6, 7, 9, 10]]
    maps, valid = scatter_tokens(gather_tokens(tokens, kept, 2), kept, (2, 2), 2)
    assert maps[0, 0].tolist() == [[2, 0], [0, 5]] and valid[0].tolist() == [[True, False], [False, True]]
    assert maps[1, 0].tolist() == [[0, 9], [10, 0]]


def test_without_a_class_token_it_counts_what_all_patches_attend_to():
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    expected = (query @ key.transpose(2, 3) / 2).softmax(-1).mean((1, 2))
    assert torch.allclose(attention_saliency(query, key, 0.5, prefix=0), expected, atol=1e-6)
    half = attention_saliency(query.half(), key.half(), 0.5, prefix=1)
    assert half.dtype == torch.float32 and half.shape == (2, 4) and not half.requires_grad


def test_saliency_is_resampled_to_the_same_places():
    saliency = torch.zeros(1, 14, 14)
    saliency[:, 2:4, 9:11] = 1.0  # rows 2, 3 and columns 9, 10 of 14
    finer = resample_saliency(saliency, 16 / 14, (16, 16))[0]
    row, column = divmod(int(finer.argmax()), 16)
    assert (row + 0.5) / 16 == pytest.approx(3 / 14, abs=0.06) and (column + 0.5) / 16 == pytest.approx(
        10 / 14, abs=0.06
    )
    coarser = resample_saliency(saliency, 0.5, (7, 7))[0]
    assert divmod(int(coarser.argmax()), 7) in ((1, 4), (1, 5))
    padded = resample_saliency(saliency, 1.0, (16, 20))[0]
    assert torch.equal(padded[:14, :14], saliency[0]) and padded.sum() == 4
    assert torch.equal(resample_saliency(saliency, 1.0, (5, 14))[0], saliency[0, :5])


# ---- steps ----


def config(student="deit_tiny_patch16_224", library="timm", **changes):
    keys = {
        "MODEL.META_ARCHITECTURE": "ImageClassifier",
        "MODEL.DEVICE": "cpu",
        "MODEL.BACKBONE.NAME": f"build_{library}_network",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.TIMM.NAME": student,
        "MODEL.CLASSIFIER.NUM_CLASSES": 10,
        "INPUT.CLASSIFICATION.SIZE": 64,
        **changes,
    }
    return load_config("", [x for pair in keys.items() for x in pair])


def distilled(tmp_path, teacher="deit_small_patch16_224", student="deit_tiny_patch16_224", **changes):
    small = {"MODEL.TIMM.ARGS": ["depth", 2, "embed_dim", 48, "num_heads", 3]}
    teacher_args = {"MODEL.TIMM.ARGS": ["depth", 3, "embed_dim", 96, "num_heads", 3]}
    if teacher.startswith("resnet"):
        teacher_args = {}
    cfg = config(teacher, **teacher_args)
    (tmp_path / "teacher.yaml").write_text(cfg.dump())
    torch.manual_seed(7)
    torch.save({"model": build_network(cfg, "teacher").state_dict()}, tmp_path / "teacher.pth")
    keys = {
        "DISTILL.TEACHER.CONFIG_FILE": str(tmp_path / "teacher.yaml"),
        "DISTILL.TEACHER.WEIGHTS": str(tmp_path / "teacher.pth"),
        "DISTILL.INIT_FROM_TEACHER.ENABLED": False,
        "DISTILL.METHODS": ["LogitKD"],
        "DISTILL.LOGIT_KD.TEACHER_PASS": "MaskedTeacher",
        **(small if student.startswith("deit") else {}),
        **changes,
    }
    torch.manual_seed(1)
    return build_distilled_model(config(student, **keys)).train()


def batch(count=3):
    generator = torch.Generator().manual_seed(2)
    image = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=generator) for _ in range(count)]
    return [{"image": x, "label": i} for i, x in enumerate(image)]


def tokens_of(model, images):
    """How many tokens the teacher's second block sees in a step, and the losses."""
    seen = []
    handle = model.teacher.model.backbone.net.blocks[1].register_forward_pre_hook(
        lambda m, args: seen.append(args[0].shape[1])
    )
    with handle:
        losses = model(images)
    return seen, losses


@pytest.mark.parametrize(
    "teacher, prefix", [("deit_small_patch16_224", 1), ("deit3_small_patch16_224", 1), ("cait_xxs24_224", 0)]
)
@pytest.mark.parametrize("student", ["deit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_the_teacher_sees_the_kept_patches_once_after_the_student(tmp_path, teacher, prefix, student):
    model = distilled(tmp_path, teacher, student)
    seen, losses = tokens_of(model, batch())
    assert seen == [prefix + 8]  # half of 4 x 4 patches
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.model.parameters())
    kind = AttentionSaliency if student.startswith("deit") else MagnitudeSaliency
    assert isinstance(model.passes.others["MaskedTeacher"].saliency, kind)


def test_all_patches_give_what_the_dense_pass_gives(tmp_path):
    losses = []
    for changes in ({"DISTILL.MASKED_TEACHER.KEEP_RATIO": 1.0}, {"DISTILL.LOGIT_KD.TEACHER_PASS": "auto"}):
        losses.append(distilled(tmp_path, **changes)(batch())["distill/LogitKD/logits"])
    assert torch.allclose(*losses, rtol=1e-5)


def test_patches_that_the_student_looks_at_are_not_random_ones(tmp_path):
    chosen = distilled(tmp_path)(batch())["distill/LogitKD/logits"]
    again = distilled(tmp_path)(batch())["distill/LogitKD/logits"]
    model = distilled(tmp_path, **{"DISTILL.MASKED_TEACHER.SELECTOR": "random"})
    state = model.passes.state_dict()
    first, second = (model(batch())["distill/LogitKD/logits"] for _ in range(2))
    assert torch.equal(chosen, again) and not torch.equal(chosen, first) and not torch.equal(first, second)
    model.passes.load_state_dict(state)
    assert torch.equal(model(batch())["distill/LogitKD/logits"], first)


def test_the_task_is_weighed_against_the_teacher(tmp_path):
    plain = distilled(tmp_path)(batch())
    half = distilled(tmp_path, **{"DISTILL.TASK_WEIGHT": 0.5, "DISTILL.LOGIT_KD.WEIGHT": 0.5})(batch())
    weight = get_key(config(), "DISTILL.LOGIT_KD.WEIGHT")
    assert torch.allclose(half["loss_cls"], 0.5 * plain["loss_cls"])
    assert torch.allclose(half["distill/LogitKD/logits"], 0.5 / weight * plain["distill/LogitKD/logits"])


def test_blocks_are_compared_where_patches_were_kept(tmp_path):
    keys = {
        "DISTILL.METHODS": ["FeatureMimic"],
        "DISTILL.FEATURE_MIMIC.TEACHER_PASS": "MaskedTeacher",
        "DISTILL.FEATURE_MIMIC.TAPS": ["blocks.1"],
        "DISTILL.FEATURE_MIMIC.TEACHER_TAPS": ["blocks.2"],
    }
    model = distilled(tmp_path, **keys)
    masked = model.passes.others["MaskedTeacher"]
    assert masked.sparse
    with masked.watch() as guidance:
        model.student(batch())
    features = masked(batch(), guidance, {})
    valid = features.valid["blocks.2"]
    assert valid.shape == (3, 4, 4) and (valid.flatten(1).sum(1) == 8).all()
    scores = masked.scores(guidance, 3, (4, 4), 16).flatten(1)
    for row, known in zip(scores, valid.flatten(1)):
        assert row[known].min() >= row[~known].max()
    assert (features.maps["blocks.2"].abs().sum(1) > 0).eq(valid).all()
    losses = model(batch())
    assert losses["distill/FeatureMimic/blocks.1"].isfinite()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"DISTILL.MASKED_TEACHER.KEEP": 17}, r"DISTILL\.MASKED_TEACHER\.KEEP is 17, and the teacher has 16 patches"),
        ({"DISTILL.MASKED_TEACHER.KEEP_RATIO": 0.0}, r"DISTILL\.MASKED_TEACHER\.KEEP_RATIO is 0\.0"),
        ({"DISTILL.MASKED_TEACHER.KEEP_RATIO": 1.5}, r"DISTILL\.MASKED_TEACHER\.KEEP_RATIO is 1\.5"),
        ({"DISTILL.MASKED_TEACHER.SELECTOR": "teacher"}, r"DISTILL\.MASKED_TEACHER\.SELECTOR is 'teacher'"),
        (
            {"student": "mobilenetv3_small_050", "DISTILL.MASKED_TEACHER.SALIENCY": "attention"},
            r"SALIENCY is attention",
        ),
        ({"teacher": "resnet10t"}, r"TEACHER_PASS MaskedTeacher .*the teacher has none"),
        ({"DISTILL.MASKED_TEACHER.MUST_KEEP": True}, r"MUST_KEEP is True, which is for teachers of detectors"),
        ({"DISTILL.MASKED_TEACHER.UNIT": "window"}, r"UNIT is window, which is for teachers of detectors"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        distilled(tmp_path, **changes)
    assert "\n" not in str(error.value)


def test_a_ratio_below_one_patch_keeps_one(tmp_path):
    seen, losses = tokens_of(distilled(tmp_path, **{"DISTILL.MASKED_TEACHER.KEEP_RATIO": 0.001}), batch())
    assert seen == [2] and all(loss.isfinite() for loss in losses.values())
