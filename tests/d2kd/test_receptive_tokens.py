"""ReceptiveTokens against values recorded from the official implementation, and its properties."""

import math

import pytest
import torch
from helpers import assert_recorded, tap_pair
from models import config, write_teacher

from d2kd.distillers import ReceptiveTokens
from d2kd.distillers.checksum import weights_checksum
from d2kd.distillers.receptive_tokens import LearnedLevel, TokenFile, TokenFileError
from d2kd.distillers.receptive_tokens.tokens import (
    TokenMasks,
    Tokens,
    WeightingBranch,
    dice,
    shifted_means,
    token_masks,
    token_weights,
)
from d2kd.layers import mask_weights, weighted_error
from d2kd.modeling import build_distilled_model, load_teacher, teacher_config

DTYPES = [torch.double, torch.float]


def branch(recorded, level="", dtype=torch.double):
    """The recorded weighting branch."""
    made = WeightingBranch(recorded[f"mask_token{level}"].shape[1], recorded[f"mask_token{level}"].shape[0]).to(dtype)
    keys = {"conv": f"prob0_{{}}{level}", "predictor": f"prob2_{{}}{level}"}
    made.load_state_dict({f"{m}.{p}": recorded[key.format(p)] for m, key in keys.items() for p in ("weight", "bias")})
    return made


def distiller(tokens, pairs=None, weight=1.0, **changes):
    published = {"normalize": "none", "position_weights": "mask_sum", "warmup_iters": 0}
    pairs = pairs or [tap_pair("p3", channels=(4, 4))]
    return ReceptiveTokens(pairs=pairs, weight=weight, tokens=tokens, **{**published, **changes})


def some_tokens(t=3, c=4, weighting=True, seed=0):
    torch.manual_seed(seed)
    return Tokens(torch.randn(t, c), *((torch.randn(t, c, 3, 3), torch.randn(t)) if weighting else ()))


# --- recorded values ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_dice_golden(golden, dtype):
    recorded = golden("maskd_dice", dtype)
    masks = recorded["masks"].requires_grad_()
    loss = dice(masks)
    loss.backward()
    assert_recorded(loss.detach(), recorded["expected_dice"], loss=True)
    assert_recorded(masks.grad, recorded["expected_grad"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["stage1_plain", "stage1_weighted"])
def test_first_stage_golden(golden, name, dtype):
    recorded = golden(f"maskd_{name}", dtype)
    t, c = recorded["mask_token"].shape
    level = TokenMasks(c, t, weighting=bool(recorded["weight_mask"])).to(dtype)
    with torch.no_grad():
        level.tokens.copy_(recorded["mask_token"])
    if level.weighting is not None:
        level.weighting = branch(recorded, dtype=dtype)
        assert_recorded(level.weighting(recorded["x"]).detach(), recorded["expected_prob"], loss=True)
    masked, masks = level(recorded["x"])
    overlap = dice(masks)
    ((masked * recorded["cotangent"]).sum() + overlap).backward()
    assert_recorded(masks.detach(), recorded["expected_mask"])
    assert_recorded(masked.detach(), recorded["expected_out"])
    assert_recorded(overlap.detach(), recorded["expected_dice"], loss=True)
    assert_recorded(level.tokens.grad, recorded["expected_grad_mask_token"])
    if level.weighting is not None:
        for ours, theirs in (("conv", "prob0"), ("predictor", "prob2")):
            for p in ("weight", "bias"):
                assert_recorded(
                    level.weighting.get_parameter(f"{ours}.{p}").grad, recorded[f"expected_grad_{theirs}_{p}"]
                )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["w_custom", "w_plain", "nw_custom", "nw_plain"])
def test_second_stage_golden(golden, mode, dtype):
    recorded = golden("maskd_stage2_level", dtype)
    weighting = branch(recorded, dtype=dtype).folded() if mode.startswith("w_") else ()
    c = recorded["student"].shape[1]
    method = distiller(
        [Tokens(recorded["mask_token"], *weighting)],
        [tap_pair("p3", channels=(c, c))],
        weight=float(recorded["loss_weight"]),
        customize=mode.endswith("custom"),
        eps=0.0,
    ).to(dtype)
    student = recorded["student"].requires_grad_()
    loss = method({"p3": student}, {"p3": recorded["teacher"]})["p3"]
    loss.backward()
    assert_recorded(token_masks(recorded["teacher"], recorded["mask_token"]), recorded["expected_teacher_mask"])
    assert_recorded(token_masks(student.detach(), recorded["mask_token"]), recorded["expected_student_mask"])
    assert_recorded(loss.detach(), recorded[f"expected_loss_{mode}"], loss=True)
    assert_recorded(student.grad, recorded[f"expected_grad_student_{mode}"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_end_to_end_golden(golden, dtype):
    recorded = golden("maskd_stage2_e2e", dtype)
    levels = [f"_{i}" for i in range(int(recorded["num_levels"]))]
    c = recorded["student_0"].shape[1]
    method = distiller(
        [
            Tokens(recorded[f"mask_token{k}"], *(x.detach() for x in branch(recorded, k, dtype).folded()))
            for k in levels
        ],
        [tap_pair(k, channels=(c, c)) for k in levels],
        weight=float(recorded["loss_weight"]),
        warmup_iters=int(recorded["warmup"]),
        aligner="conv",
    ).to(dtype)
    for i, k in enumerate(levels):
        method.align[i].load_state_dict({p: recorded[f"align_{p}{k}"] for p in ("weight", "bias")})
    students = {k: recorded[f"student{k}"].requires_grad_() for k in levels}
    teachers = {k: recorded[f"teacher{k}"] for k in levels}
    for expected in recorded["expected_maskd_loss_per_call"]:
        loss = sum(method(students, teachers).values())
        assert_recorded(loss.detach(), expected, loss=True)
    conv = torch.nn.functional.conv2d
    for i, k in enumerate(levels):
        ours = conv(students[k], recorded["head_student_weight"], recorded["head_student_bias"])
        theirs = conv(teachers[k], recorded["head_teacher_weight"], recorded["head_teacher_bias"])
        term = float(recorded["head_weight"]) * torch.nn.functional.smooth_l1_loss(
            ours, theirs, beta=float(recorded["head_beta"])
        )
        assert_recorded(term.detach(), recorded["expected_head_loss_per_level"][i], loss=True)
        loss = loss + term
    loss.backward()
    for i, k in enumerate(levels):
        assert_recorded(students[k].grad, recorded[f"expected_grad_student_last{k}"])
        assert_recorded(method.align[i].weight.grad, recorded[f"expected_grad_align_weight_last{k}"])
        assert_recorded(method.align[i].bias.grad, recorded[f"expected_grad_align_bias_last{k}"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_segmentation_golden(golden, dtype):
    recorded = golden("maskd_seg", dtype)
    c = recorded["mask_token"].shape[1]
    method = distiller(
        [Tokens(recorded["mask_token"])] * 2,
        [tap_pair(tap, channels=(c, c)) for tap in ("main", "aux")],
        weight=float(recorded["factor"]),
        tap_weights=[1.0, float(recorded["aux_weight"])],
        customize=False,
        eps=float(recorded["eps"]),
    ).to(dtype)
    student = {k: recorded[f"{k}_student"].requires_grad_() for k in ("main", "aux")}
    losses = method(student, {k: recorded[f"{k}_teacher"] for k in ("main", "aux")})
    sum(losses.values()).backward()
    assert_recorded(losses["main"].detach(), recorded["expected_loss_main"], loss=True)
    assert_recorded(losses["aux"].detach() / float(recorded["aux_weight"]), recorded["expected_loss_aux"], loss=True)
    assert_recorded(sum(losses.values()).detach(), recorded["expected_loss_total"], loss=True)
    for k, x in student.items():
        assert_recorded(x.grad, recorded[f"expected_grad_{k}_student"])
    level = TokenMasks(c, len(recorded["mask_token"]), weighting=False).to(dtype)
    level.tokens.data.copy_(recorded["mask_token"])
    masked, masks = level(recorded["main_teacher"])
    assert_recorded(masked.detach(), recorded["expected_stage1_out"])
    assert_recorded(dice(masks).detach(), recorded["expected_stage1_dice"], loss=True)


# --- layers ---


def test_one_token_has_dice_zero_and_a_gradient_of_zero():
    masks = torch.rand(2, 1, 5, 5, requires_grad=True)
    loss = dice(masks)
    loss.backward()
    assert loss.item() == 0 and not masks.grad.any()


def test_dice_of_equal_masks_is_one_and_of_disjoint_masks_zero():
    half = torch.zeros(1, 1, 4, 4)
    half[..., :2, :] = 1
    assert dice(torch.cat([half, half], 1)).item() == pytest.approx(1)
    assert dice(torch.cat([half, 1 - half], 1)).item() == 0
    assert dice(torch.zeros(1, 3, 4, 4)).item() == 0


@pytest.mark.parametrize("size", [(7, 9), (1, 1), (1, 5), (3, 1), (2, 2)])
def test_shifted_means_replace_a_pooled_convolution(size):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 5, kernel_size=3, padding=1, bias=False).double()
    x = torch.randn(2, 3, *size, dtype=torch.double)
    got = torch.einsum("ncij,dcij->nd", shifted_means(x), conv.weight)
    torch.testing.assert_close(got, conv(x).mean((2, 3)), rtol=1e-12, atol=1e-13)


def test_weights_have_sum_one_and_float32_for_half_maps():
    level = some_tokens()
    w = token_weights(torch.randn(2, 4, 5, 6).half(), level.weight, level.bias)
    assert w.dtype == torch.float32 and torch.allclose(w.sum(1), torch.ones(2))
    assert token_masks(torch.randn(2, 4, 5, 6).bfloat16(), level.tokens).dtype == torch.float32


def test_gradient_of_the_weighted_error():
    torch.manual_seed(0)
    s, t = (torch.randn(2, 3, 4, 5, dtype=torch.double) for _ in range(2))
    a = torch.rand(2, 4, 5, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda x: weighted_error(x, t, a), s.requires_grad_())
    assert weighted_error(s, t, a).item() == pytest.approx(((s - t).square().mean(1) * a).sum().item() / 2)


def test_weighted_error_of_half_maps_is_float32_and_gives_half_gradients():
    s, t = torch.randn(1, 3, 4, 4).bfloat16().requires_grad_(), torch.randn(1, 3, 4, 4)
    loss = weighted_error(s, t, torch.ones(1, 4, 4))
    loss.backward()
    assert loss.dtype == torch.float32 and s.grad.dtype == torch.bfloat16


def test_masks_that_are_zero_everywhere_give_zero_not_nan():
    tokens = Tokens(torch.full((2, 4), -1e4))
    method = distiller([tokens], position_weights="mask_sum")
    loss = method({"p3": torch.ones(1, 4, 3, 3)}, {"p3": torch.ones(1, 4, 3, 3)})["p3"]
    assert loss.item() == 0


def test_mean_weights_of_an_image_have_sum_one():
    masks, weights = torch.rand(2, 3, 4, 5), torch.rand(2, 3).softmax(1)
    plain, mean = (mask_weights(masks, weights, 1e-12, mean=m) for m in (False, True))
    assert torch.allclose(mean.sum((1, 2)), torch.ones(2))
    assert torch.allclose(mean, plain / plain.sum((1, 2), keepdim=True))
    assert not mask_weights(torch.zeros(1, 2, 3, 3), torch.ones(1, 2), 1e-12, mean=True).any()


# --- the method ---


@pytest.mark.parametrize("normalize", ["none", "standardize"])
@pytest.mark.parametrize("position_weights", ["mask_sum", "unit_sum"])
def test_equal_maps_cost_nothing_and_other_channels_are_aligned(normalize, position_weights):
    x, settings = torch.randn(2, 4, 6, 7), {"normalize": normalize, "position_weights": position_weights}
    assert distiller([some_tokens()], **settings)({"p3": x}, {"p3": x})["p3"].item() < 1e-10
    method = distiller(
        [some_tokens()], [tap_pair("p3", channels=(6, 4))], normalize=normalize, position_weights=position_weights
    )
    student = torch.randn(2, 6, 6, 7, requires_grad=True)
    method({"p3": student}, {"p3": x})["p3"].backward()
    assert student.grad.abs().sum() > 0 and method.align[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("part", [False, True], ids=["whole", "partly known"])
@pytest.mark.parametrize("position_weights", ["unit_sum", "mask_sum"])
def test_the_default_form_is_that_of_standardized_maps_masked_on_the_teachers_scale(position_weights, part):
    torch.manual_seed(1)
    scale = torch.tensor([0.1, 1.0, 5.0, 20.0], dtype=torch.double).view(-1, 1, 1)
    teacher = torch.randn(2, 4, 8, 6, dtype=torch.double) * scale + 3
    student = (0.3 * teacher + torch.randn_like(teacher) * scale - 50).requires_grad_()
    tokens = some_tokens()
    method = distiller([tokens], normalize="standardize", position_weights=position_weights).double()
    valid = torch.rand(2, 8, 6) < 0.6 if part else torch.ones(2, 8, 6, dtype=torch.bool)
    known = valid[:, None].double() / valid.sum()

    def standardized(x):
        mean = (x * known).sum((0, 2, 3), keepdim=True)
        variance = ((x - mean).square() * known).sum((0, 2, 3), keepdim=True)
        return (x - mean) / (variance + 1e-6).sqrt(), mean, variance

    (s, *_), (t, mean, variance) = standardized(student), standardized(teacher.where(valid[:, None], 0))
    with torch.no_grad():
        e = method.levels[0].tokens
        masks = torch.einsum("tc,nchw->nthw", e, teacher).sigmoid() * valid[:, None]
        masks *= torch.einsum("tc,nchw->nthw", e, s * (variance + 1e-6).sqrt() + mean).sigmoid()
        whole = teacher.where(valid[:, None], 0)
        of_tokens = token_weights(whole, tokens.weight.double(), tokens.bias.double())
        of_positions = mask_weights(masks, of_tokens, method.eps, mean=position_weights == "unit_sum")
    expected = (of_positions * (s - t).square().mean(1)).sum() / 2
    (wanted,) = torch.autograd.grad(expected, student)
    (found,) = method({"p3": student}, {"p3": teacher}, {"p3": valid} if part else None).values()
    (gradient,) = torch.autograd.grad(3 * found, student)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient / 3, wanted, rtol=1e-8, atol=1e-12)


def test_weight_zero_gives_the_student_no_gradient_and_the_aligner_zeros():
    method = distiller([some_tokens()], [tap_pair("p3", channels=(6, 4))], weight=0.0)
    student = torch.randn(2, 6, 5, 5, requires_grad=True)
    loss = method({"p3": student}, {"p3": torch.randn(2, 4, 5, 5)})["p3"]
    loss.backward()
    assert loss.item() == 0 and student.grad is None
    assert all(p.grad is not None and not p.grad.any() for p in method.parameters())


def test_only_aligners_are_trained_and_tokens_stay():
    method = distiller([some_tokens()], aligner="conv")
    assert [name for name, _ in method.named_parameters()] == ["align.0.weight", "align.0.bias"]
    assert torch.equal(method.levels[0].tokens, some_tokens().tokens)


def test_tap_weights_scale_their_level():
    tokens, maps = [some_tokens(), some_tokens(seed=1)], [torch.randn(1, 4, 5, 5) for _ in range(4)]
    pairs = [tap_pair(tap, channels=(4, 4)) for tap in ("p3", "p4")]
    student, teacher = dict(zip(["p3", "p4"], maps)), dict(zip(["p3", "p4"], maps[2:]))
    plain = distiller(tokens, pairs)(student, teacher)
    scaled = distiller(tokens, pairs, tap_weights=[1.0, 3.0])(student, teacher)
    assert scaled["p3"] == plain["p3"] and scaled["p4"].item() == pytest.approx(3 * plain["p4"].item())


def test_the_warm_up_is_continued_by_a_checkpoint():
    maps = [torch.randn(1, 4, 5, 5) for _ in range(2)]
    calls = lambda method, n: [method({"p3": maps[0]}, {"p3": maps[1]})["p3"].item() for _ in range(n)]  # noqa: E731
    make = lambda: distiller([some_tokens()], warmup_iters=3)  # noqa: E731
    whole = calls(make(), 5)
    assert whole[0] == whole[2] != whole[3] == whole[4]
    first = make()
    before = calls(first, 2)
    second = make()
    second.load_state_dict(first.state_dict())
    assert before + calls(second, 3) == whole
    first.eval()
    assert calls(first, 1) == whole[:1] and first.calls == 2  # only training counts


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (4, 2)])
def test_the_warm_up_counts_iterations_whatever_their_batches(before, after):
    make = lambda batches: distiller([some_tokens()], warmup_iters=10, batches_per_iteration=batches)  # noqa: E731
    first = make(before)
    first.calls = 7 * before
    second = make(after)
    second.set_extra_state(first.get_extra_state())
    assert second.calls == 7 * after and not second.customizing
    second.calls += 3 * after
    assert second.customizing


def test_a_checkpoint_with_other_tokens_is_an_error():
    saved = distiller([some_tokens()]).state_dict()
    with pytest.raises((TokenFileError, RuntimeError), match=r"DISTILL\.RECEPTIVE_TOKENS\.FILE holds other tokens"):
        distiller([some_tokens(seed=1)]).load_state_dict(saved)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(weight=-1.0), r"DISTILL\.RECEPTIVE_TOKENS\.WEIGHT\b"),
        (dict(aligner="linear"), r"DISTILL\.RECEPTIVE_TOKENS\.ALIGN\b"),
        (dict(warmup_iters=-1), r"DISTILL\.RECEPTIVE_TOKENS\.WARMUP_ITERS\b"),
        (dict(eps=-1.0), r"DISTILL\.RECEPTIVE_TOKENS\.EPS\b"),
        (dict(normalize="l2"), r"\bNORMALIZE is 'l2'"),
        (dict(position_weights="sum"), r"DISTILL\.RECEPTIVE_TOKENS\.POSITION_WEIGHTS is 'sum'"),
        (dict(tap_weights=[1.0, 2.0]), r"DISTILL\.RECEPTIVE_TOKENS\.TAP_WEIGHTS\b"),
        (dict(tap_weights=[-1.0]), r"DISTILL\.RECEPTIVE_TOKENS\.TAP_WEIGHTS\[0\] is -1\.0"),
        (
            dict(pairs=[tap_pair("p3", channels=(4, 4), strides=(1.0, 64.0))]),
            r"DISTILL\.RECEPTIVE_TOKENS\.TAPS, p3 <- p3",
        ),
    ],
)
def test_arguments_out_of_range_name_the_key(change, message):
    with pytest.raises(ValueError, match=message):
        distiller([some_tokens()], **change)


# --- token files ---


def write_tokens(path, teacher="", taps=("p3", "p4", "p5", "p6", "p7"), channels=8, t=3):
    levels = {tap: LearnedLevel(some_tokens(t, channels, seed=i), 0.1) for i, tap in enumerate(taps)}
    made = TokenFile(teacher, levels, iterations=10)
    made.save(str(path))
    return made


def test_a_token_file_keeps_everything(tmp_path):
    path = tmp_path / "new" / "tokens.pth"
    made = write_tokens(path, teacher="abc", taps=["p3", "res4.pre_relu"])
    read = TokenFile.load(str(path))
    assert (read.teacher, read.iterations, list(read.levels)) == ("abc", 10, ["p3", "res4.pre_relu"])
    for tap, level in made.levels.items():
        assert read.levels[tap].dice == level.dice
        assert all(torch.equal(a, b) for a, b in zip(read.levels[tap].tokens, level.tokens))
    assert [p.name for p in path.parent.iterdir()] == ["tokens.pth"]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, r"DISTILL\.RECEPTIVE_TOKENS\.FILE .*no such file"),
        (b"text", r"DISTILL\.RECEPTIVE_TOKENS\.FILE .* cannot be read"),
        (b"import torch", r"DISTILL\.RECEPTIVE_TOKENS\.FILE .* cannot be read"),
        ({"model": {}}, r"DISTILL\.RECEPTIVE_TOKENS\.FILE .* is not a token file"),
    ],
)
def test_files_that_are_no_token_files(tmp_path, content, message):
    path = tmp_path / "tokens.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(TokenFileError, match=message) as error:
        TokenFile.load(str(path))
    assert "weights_only" not in str(error.value)  # torch's advice on such files is to run their code


def test_a_damaged_token_file_is_an_error(tmp_path):
    path = tmp_path / "tokens.pth"
    write_tokens(path)
    content = torch.load(path)
    content["levels"]["p4"]["bias"] = torch.zeros(7)
    torch.save(content, path)
    with pytest.raises(TokenFileError, match=r"DISTILL\.RECEPTIVE_TOKENS\.FILE .* is damaged"):
        TokenFile.load(str(path))


@pytest.mark.parametrize(
    "file, keys, message",
    [
        (dict(teacher="0" * 32), {}, r"DISTILL\.RECEPTIVE_TOKENS\.FILE was learned on another teacher"),
        (dict(taps=["p3", "p4"]), {}, r"DISTILL\.RECEPTIVE_TOKENS\.FILE has no tokens for the teacher's 'p5'"),
        (dict(channels=16), {}, r"DISTILL\.RECEPTIVE_TOKENS\.FILE: .* 16 channels"),
        (
            dict(),
            {"DISTILL__RECEPTIVE_TOKENS__TOKEN_TAPS": ["p3"]},
            r"DISTILL\.RECEPTIVE_TOKENS\.TOKEN_TAPS names 1 taps",
        ),
        (dict(), {"DISTILL__RECEPTIVE_TOKENS__FILE": ""}, r"DISTILL\.RECEPTIVE_TOKENS\.FILE is empty"),
    ],
)
def test_a_token_file_that_does_not_fit_is_an_error(tmp_path, file, keys, message):
    with pytest.raises(TokenFileError, match=message):
        build_distilled_model(distillation(tmp_path, file, **keys))


def distillation(tmp_path, file, **keys):
    teacher_keys = write_teacher(tmp_path)
    cfg = config(**{**teacher_keys, "DISTILL__METHODS": ["ReceptiveTokens"]})
    checksum = weights_checksum(load_teacher(teacher_config(cfg))[0].state_dict())
    write_tokens(tmp_path / "tokens.pth", **{"teacher": checksum, **file})
    keys = {"DISTILL__RECEPTIVE_TOKENS__FILE": str(tmp_path / "tokens.pth"), **keys}
    return config(**{**teacher_keys, "DISTILL__METHODS": ["ReceptiveTokens"], **keys})


def test_the_method_trains_a_detector(tmp_path):
    from models import batch

    from detectron2.utils.events import EventStorage

    model = build_distilled_model(distillation(tmp_path, {}))
    model.train()
    with EventStorage():
        losses = model(batch())
    levels = [v for k, v in losses.items() if k.startswith("distill/ReceptiveTokens/")]
    assert len(levels) == 5 and all(math.isfinite(v.item()) and v.item() > 0 for v in levels)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_warm_up_is_counted_in_iterations_not_batches(tmp_path):
    keys = {"SOLVER__ACCUMULATE": 4, "DISTILL__RECEPTIVE_TOKENS__WARMUP_ITERS": 3}
    method = build_distilled_model(distillation(tmp_path, {}, **keys)).distillers["ReceptiveTokens"]
    method.calls = 11
    assert not method.customizing
    method.calls = 12
    assert method.customizing


def test_the_checksum_sees_weights_not_their_device_or_order():
    state = {"a": torch.ones(2), "b": torch.zeros(3), "steps": torch.tensor(4)}
    reordered = {"steps": torch.tensor(5), "b": torch.zeros(3), "a": torch.ones(2)}
    assert weights_checksum(state) == weights_checksum(reordered)
    assert weights_checksum(state) != weights_checksum({**state, "b": torch.full((3,), 1e-7)})
    assert weights_checksum(state) != weights_checksum({**state, "b": torch.zeros(3, 1)})
