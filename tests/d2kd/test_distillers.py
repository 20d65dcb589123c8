"""Distillers against values recorded from the official implementations, and their properties."""

import pytest
import torch
from helpers import assert_recorded, tap_pair
from models import config, write_teacher

from d2kd.distillers import FeatureMimic, MaskedGenerative
from d2kd.layers.masks import keep_mask
from d2kd.modeling import build_distilled_model


def masked_generative(recorded, levels=("",), dtype=torch.double):
    maps = [[recorded[f"{name}{level}"] for name in map_names(recorded, level)] for level in levels]
    pairs = [tap_pair(f"p{i}", channels=(s.shape[1], t.shape[1])) for i, (s, t) in enumerate(maps)]
    kind = "channel" if recorded.get("mask_is_channel", 0) else "spatial"
    numbers = {"weight": float(recorded["alpha"]), "mask_ratio": float(recorded["lam"])}
    distiller = MaskedGenerative(pairs=pairs, mask=kind, normalize="none", reduction="batchmean", **numbers).to(dtype)
    state = {}
    for i, level in enumerate(levels):
        for ours, theirs in ((f"generation.{i}.0", "gen0"), (f"generation.{i}.2", "gen2"), (f"align.{i}", "align")):
            if f"{theirs}_weight{level}" in recorded:
                state.update(
                    {
                        f"{ours}.weight": recorded[f"{theirs}_weight{level}"],
                        f"{ours}.bias": recorded[f"{theirs}_bias{level}"],
                    }
                )
    state["_extra_state"] = distiller.get_extra_state()
    distiller.load_state_dict(state)
    return distiller


def map_names(recorded, level):
    return ("student", "teacher") if f"student{level}" in recorded else ("feat_student", "feat_teacher")


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
@pytest.mark.parametrize("name", ["mgd_det_equal", "mgd_det_align", "mgd_seg_align", "mgd_cls_equal", "mgd_cls_align"])
def test_masked_generative_golden(golden, name, dtype):
    recorded = golden(name, dtype)
    distiller = masked_generative(recorded, dtype=dtype)
    student = recorded["student"].requires_grad_()
    keep = recorded["keep_mask"]
    assert torch.equal(keep_mask(recorded["rand"].float(), distiller.mask_ratio, distiller.mask), keep.bool())
    loss = distiller.weight * distiller.level_loss(0, student, recorded["teacher"], keep=keep)
    loss.backward()
    assert abs(loss.item() / float(recorded["expected_loss"]) - 1) <= (1e-9 if dtype == torch.double else 1e-5)
    assert_recorded(student.grad, recorded["expected_grad_student"])
    for ours, theirs in (("generation.0.0", "gen0"), ("generation.0.2", "gen2"), ("align.0", "align")):
        if f"expected_grad_{theirs}_weight" in recorded:
            module = distiller.get_submodule(ours)
            assert_recorded(module.weight.grad, recorded[f"expected_grad_{theirs}_weight"])
            assert_recorded(module.bias.grad, recorded[f"expected_grad_{theirs}_bias"])


def test_masked_generative_golden_multilevel(golden):
    recorded = golden("mgd_det_multilevel", torch.double)
    levels = [f"_{i}" for i in range(int(recorded["num_levels"]))]
    distiller = masked_generative(recorded, levels)
    total = 0.0
    for i, level in enumerate(levels):
        student = recorded[f"student{level}"].requires_grad_()
        keep = recorded[f"keep_mask{level}"]
        loss = distiller.weight * distiller.level_loss(i, student, recorded[f"teacher{level}"], keep=keep)
        loss.backward()
        assert abs(loss.item() / float(recorded[f"expected_loss{level}"]) - 1) <= 1e-9
        assert_recorded(student.grad, recorded[f"expected_grad_student{level}"])
        total += loss.item()
    assert abs(total / float(recorded["expected_loss_total"]) - 1) <= 1e-9


def test_masked_generative_golden_segmentation_features(golden):
    recorded = golden("mgd_seg_logit", torch.double)
    distiller = masked_generative(recorded)
    student = recorded["feat_student"].requires_grad_()
    loss = distiller.weight * distiller.level_loss(0, student, recorded["feat_teacher"], keep=recorded["keep_mask"])
    loss.backward()
    assert abs(loss.item() / float(recorded["expected_loss_mgd"]) - 1) <= 1e-9
    assert_recorded(student.grad, recorded["expected_grad_feat_student"])


METHODS = {
    "FeatureMimic": lambda pairs, weight: FeatureMimic(
        pairs=pairs, weight=weight, normalize="standardize", reduction="mean"
    ),
    "MaskedGenerative": lambda pairs, weight: MaskedGenerative(pairs=pairs, weight=weight, mask_ratio=0.5),
}


@pytest.mark.parametrize("method", METHODS)
def test_weight_zero_gives_the_student_no_gradient_and_every_parameter_one(method):
    distiller = METHODS[method]([tap_pair("p3", channels=(4, 6))], 0.0)
    student = torch.randn(2, 4, 5, 5, requires_grad=True)
    losses = distiller({"p3": student}, {"p3": torch.randn(2, 6, 5, 5)})
    assert list(losses) == ["p3"] and losses["p3"].item() == 0
    losses["p3"].backward()
    assert student.grad is None
    assert all(p.grad is not None and not p.grad.any() for p in distiller.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_loss_scales_with_the_weight_and_the_teacher_gets_no_gradient(method):
    values = []
    for weight in (1.0, 3.0):
        torch.manual_seed(0)
        distiller = METHODS[method]([tap_pair("p3", channels=(4, 6))], weight)
        teacher = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        student = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(2))
        loss = distiller({"p3": student}, {"p3": teacher})["p3"]
        loss.backward()
        assert teacher.grad is None
        values.append(loss.item())
    assert values[1] == pytest.approx(3 * values[0])


def test_mimic_of_itself_is_zero_whatever_the_scale():
    x = torch.randn(2, 4, 6, 6)
    distiller = METHODS["FeatureMimic"]([tap_pair("p3", channels=(4, 4))], 1.0)
    assert distiller({"p3": x}, {"p3": 100 * x + 7})["p3"].item() < 1e-6
    assert distiller({"p3": x}, {"p3": -x})["p3"].item() == pytest.approx(4.0, abs=1e-4)


def test_mask_position_survives_a_checkpoint():
    make = lambda: METHODS["MaskedGenerative"]([tap_pair("p3", channels=(4, 4))], 1.0)  # noqa: E731
    maps = {"p3": torch.randn(2, 4, 8, 8)}
    torch.manual_seed(0)
    one = make()
    one(maps, maps)
    other = make()
    other.load_state_dict(one.state_dict())
    assert other(maps, maps)["p3"].item() == one(maps, maps)["p3"].item()


def test_mask_ratio_zero_generates_from_everything():
    pairs = [tap_pair("p3", channels=(4, 4))]
    distiller = MaskedGenerative(pairs=pairs, mask_ratio=0.0, normalize="none", reduction="batchmean")
    x, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    want = (distiller.generation[0](x) - t).square().sum() / 2
    assert distiller.level_loss(0, x, t).item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(mask_ratio=1.5), r"DISTILL\.MASKED_GENERATIVE\.MASK_RATIO\b"),
        (dict(mask="pixel"), r"\bMASK is 'pixel'"),
        (dict(weight=-1.0), r"DISTILL\.MASKED_GENERATIVE\.WEIGHT\b"),
        (dict(normalize="l2"), r"\bNORMALIZE is 'l2'"),
        (dict(reduction="sum"), r"\bREDUCTION is 'sum'"),
        (dict(pairs=[]), r"DISTILL\.MASKED_GENERATIVE\.TAPS\b"),
        (
            dict(pairs=[tap_pair("p3", channels=(4, 4)), tap_pair("p3", channels=(4, 8))]),
            r"DISTILL\.MASKED_GENERATIVE\.TAPS names p3 more than once",
        ),
    ],
)
def test_arguments_out_of_range_name_the_key(change, message):
    arguments = dict(pairs=[tap_pair("p3", channels=(4, 4))], weight=1.0, mask_ratio=0.5)
    with pytest.raises(ValueError, match=message):
        MaskedGenerative(**{**arguments, **change})


@pytest.mark.parametrize("strides", [(8.0, 8.0), (8.0, 16.0), (8.0, 4.0)])
@pytest.mark.parametrize("method", [FeatureMimic, MaskedGenerative])
def test_what_the_teacher_did_not_compute_may_be_anything(method, strides):
    torch.manual_seed(0)
    distiller = method(pairs=[tap_pair("p3", channels=(4, 4), strides=strides)])
    side = int(8 * strides[0] / strides[1])
    s, t = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 4, side, side)
    valid = torch.ones(2, side, side, dtype=torch.bool)
    state = distiller.get_extra_state() if method is MaskedGenerative else None
    whole = distiller({"p3": s}, {"p3": t})["p3"]
    if state is not None:  # the same masks once more
        distiller.set_extra_state(state)
    assert torch.allclose(distiller({"p3": s}, {"p3": t}, {"p3": valid})["p3"], whole, rtol=1e-5)
    valid[:, :, side // 2 :] = False
    t[:, :, :, side // 2 :] = float("nan")
    loss = distiller({"p3": s}, {"p3": t}, {"p3": valid})["p3"]
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(s.grad).all() and s.grad.abs().sum() > 0


def test_what_is_random_goes_with_the_seed_of_the_run_or_has_its_own(tmp_path):
    named = write_teacher(tmp_path)

    def masks(**changes):
        method = build_distilled_model(config(DISTILL__METHODS=["MaskedGenerative"], **changes, **named)).distillers
        return method["MaskedGenerative"].masks.uniform((50,), torch.device("cpu"))

    assert torch.equal(masks(SEED=1), masks(SEED=1)) and not torch.equal(masks(SEED=1), masks(SEED=2))
    own = {"DISTILL__MASKED_GENERATIVE__SEED": 2}
    assert torch.equal(masks(SEED=1, **own), masks(SEED=2)) and torch.equal(masks(SEED=1, **own), masks(SEED=7, **own))
