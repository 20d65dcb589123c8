"""Distillers against values recorded from the official implementations, and their properties."""

import numpy as np
import pytest
import torch

from d2kd.distillers import FeatureMimic, MaskedGenerative, TapPair
from d2kd.layers import TapShape
from d2kd.layers.masks import keep_mask


def pair(name, student, teacher):
    return TapPair(name, name, TapShape(student, 1.0), TapShape(teacher, 1.0))


def load(data_dir, name, dtype):
    with np.load(data_dir / "golden" / f"{name}.npz") as z:
        return {k: torch.from_numpy(z[k]).to(dtype) if z[k].dtype.kind == "f" and z[k].ndim else z[k] for k in z.files}


def masked_generative(g, levels=("",), dtype=torch.double):
    maps = [[g[f"{name}{level}"] for name in names(g, level)] for level in levels]
    pairs = [pair(f"p{i}", student.shape[1], teacher.shape[1]) for i, (student, teacher) in enumerate(maps)]
    kind = "channel" if g.get("mask_is_channel", 0) else "spatial"
    distiller = MaskedGenerative(pairs=pairs, weight=float(g["alpha"]), mask_ratio=float(g["lam"]), mask=kind).to(dtype)
    state = {}
    for i, level in enumerate(levels):
        for ours, theirs in ((f"generation.{i}.0", "gen0"), (f"generation.{i}.2", "gen2"), (f"align.{i}", "align")):
            if f"{theirs}_weight{level}" in g:
                state.update(
                    {f"{ours}.weight": g[f"{theirs}_weight{level}"], f"{ours}.bias": g[f"{theirs}_bias{level}"]}
                )
    state["_extra_state"] = distiller.get_extra_state()
    distiller.load_state_dict(state)
    return distiller


def names(g, level):
    return ("student", "teacher") if f"student{level}" in g else ("feat_student", "feat_teacher")


def close(got, want, dtype):
    want = torch.as_tensor(np.asarray(want)).to(got.dtype)
    error = (got - want).abs().max() / want.abs().max()
    assert error <= (1e-6 if dtype == torch.double else 1e-4)


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
@pytest.mark.parametrize("name", ["mgd_det_equal", "mgd_det_align", "mgd_seg_align", "mgd_cls_equal", "mgd_cls_align"])
def test_masked_generative_golden(data_dir, name, dtype):
    g = load(data_dir, name, dtype)
    distiller = masked_generative(g, dtype=dtype)
    student = g["student"].requires_grad_()
    keep = torch.as_tensor(g["keep_mask"])
    assert torch.equal(keep_mask(g["rand"].float(), distiller.mask_ratio, distiller.mask), keep.bool())
    loss = distiller.weight * distiller.level_loss(0, student, g["teacher"], keep=keep)
    loss.backward()
    assert abs(loss.item() / float(g["expected_loss"]) - 1) <= (1e-9 if dtype == torch.double else 1e-5)
    close(student.grad, g["expected_grad_student"], dtype)
    for ours, theirs in (("generation.0.0", "gen0"), ("generation.0.2", "gen2"), ("align.0", "align")):
        if f"expected_grad_{theirs}_weight" in g:
            module = distiller.get_submodule(ours)
            close(module.weight.grad, g[f"expected_grad_{theirs}_weight"], dtype)
            close(module.bias.grad, g[f"expected_grad_{theirs}_bias"], dtype)


def test_masked_generative_golden_multilevel(data_dir):
    g = load(data_dir, "mgd_det_multilevel", torch.double)
    levels = [f"_{i}" for i in range(int(g["num_levels"]))]
    distiller = masked_generative(g, levels)
    total = 0.0
    for i, level in enumerate(levels):
        student = g[f"student{level}"].requires_grad_()
        keep = torch.as_tensor(g[f"keep_mask{level}"])
        loss = distiller.weight * distiller.level_loss(i, student, g[f"teacher{level}"], keep=keep)
        loss.backward()
        assert abs(loss.item() / float(g[f"expected_loss{level}"]) - 1) <= 1e-9
        close(student.grad, g[f"expected_grad_student{level}"], torch.double)
        total += loss.item()
    assert abs(total / float(g["expected_loss_total"]) - 1) <= 1e-9


def test_masked_generative_golden_segmentation_features(data_dir):
    g = load(data_dir, "mgd_seg_logit", torch.double)
    distiller = masked_generative(g)
    student = g["feat_student"].requires_grad_()
    loss = distiller.weight * distiller.level_loss(0, student, g["feat_teacher"], keep=torch.as_tensor(g["keep_mask"]))
    loss.backward()
    assert abs(loss.item() / float(g["expected_loss_mgd"]) - 1) <= 1e-9
    close(student.grad, g["expected_grad_feat_student"], torch.double)


METHODS = {
    "FeatureMimic": lambda pairs, weight: FeatureMimic(
        pairs=pairs, weight=weight, normalize="standardize", reduction="mean"
    ),
    "MaskedGenerative": lambda pairs, weight: MaskedGenerative(pairs=pairs, weight=weight, mask_ratio=0.5),
}


@pytest.mark.parametrize("method", METHODS)
def test_weight_zero_gives_the_student_no_gradient_and_every_parameter_one(method):
    distiller = METHODS[method]([pair("p3", 4, 6)], 0.0)
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
        distiller = METHODS[method]([pair("p3", 4, 6)], weight)
        teacher = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        student = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(2))
        loss = distiller({"p3": student}, {"p3": teacher})["p3"]
        loss.backward()
        assert teacher.grad is None
        values.append(loss.item())
    assert values[1] == pytest.approx(3 * values[0])


def test_mimic_of_itself_is_zero_whatever_the_scale():
    x = torch.randn(2, 4, 6, 6)
    distiller = METHODS["FeatureMimic"]([pair("p3", 4, 4)], 1.0)
    assert distiller({"p3": x}, {"p3": 100 * x + 7})["p3"].item() < 1e-6
    assert distiller({"p3": x}, {"p3": -x})["p3"].item() == pytest.approx(4.0, abs=1e-4)


def test_mask_position_survives_a_checkpoint():
    make = lambda: METHODS["MaskedGenerative"]([pair("p3", 4, 4)], 1.0)  # noqa: E731
    maps = {"p3": torch.randn(2, 4, 8, 8)}
    torch.manual_seed(0)
    one = make()
    one(maps, maps)
    other = make()
    other.load_state_dict(one.state_dict())
    assert other(maps, maps)["p3"].item() == one(maps, maps)["p3"].item()


def test_mask_ratio_zero_generates_from_everything():
    distiller = MaskedGenerative(pairs=[pair("p3", 4, 4)], weight=1.0, mask_ratio=0.0)
    x, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    want = (distiller.generation[0](x) - t).square().sum() / 2
    assert distiller.level_loss(0, x, t).item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(mask_ratio=1.5), "MASK_RATIO"),
        (dict(mask="pixel"), "MASK"),
        (dict(weight=-1.0), "WEIGHT"),
        (dict(normalize="l2"), "NORMALIZE"),
        (dict(reduction="sum"), "REDUCTION"),
        (dict(pairs=[]), "TAPS"),
        (dict(pairs=[pair("p3", 4, 4), pair("p3", 4, 8)]), "MASKED_GENERATIVE.TAPS names p3 more than once"),
    ],
)
def test_arguments_out_of_range_name_the_key(change, message):
    arguments = dict(pairs=[pair("p3", 4, 4)], weight=1.0, mask_ratio=0.5)
    with pytest.raises(ValueError, match=message):
        MaskedGenerative(**{**arguments, **change})
