"""Alignment, normalization, masks and reductions."""

import math

import numpy as np
import pytest
import torch
from helpers import tap_pair

from d2kd.distillers import AlignmentError
from d2kd.distillers.taps import build_aligner, check_alignable
from d2kd.layers import (
    RandomMasks,
    align_resolution,
    align_validity,
    keep_mask,
    normalize,
    rescale,
    softplus,
    squared_error,
    standardize,
    standardized_error,
)


def test_standardize_does_not_see_scale_and_offset():
    x = torch.randn(3, 5, 7, 6, dtype=torch.double)
    scaled = x * torch.rand(1, 5, 1, 1).double().add(0.5) * 100 + torch.randn(1, 5, 1, 1).double()
    y = standardize(x)
    assert torch.allclose(y, standardize(scaled), atol=1e-5)
    assert torch.allclose(y.mean((0, 2, 3)), torch.zeros(5).double(), atol=1e-9)
    assert torch.allclose(y.pow(2).mean((0, 2, 3)), torch.ones(5).double(), atol=1e-5)


def literal_error(student, teacher, reduction):
    return squared_error(standardize(student), standardize(teacher), reduction)


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
@pytest.mark.parametrize("shape", [(2, 5, 7, 6), (1, 3, 1, 1), (4, 2, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_fused_error_is_that_of_standardized_maps(shape, reduction, dtype):
    torch.manual_seed(0)
    teacher = torch.randn(shape, dtype=torch.float64) * 3 + 100
    student = 0.5 * teacher + torch.randn(shape, dtype=torch.float64)
    student[:, 1] = 7  # a channel that is constant
    teacher[:, 0] = 1e-4 * torch.randn(shape[0], *shape[2:])  # and one whose variance is about EPS
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
    # what they are in this precision, compared in that of float64
    exact = student.detach().double().requires_grad_()
    expected = literal_error(exact, teacher.double(), reduction)
    expected.backward()
    found = standardized_error(student, teacher, reduction)
    (3 * found).backward()
    digits = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert student.grad.dtype == dtype and student.grad.isfinite().all()
    torch.testing.assert_close(found.double(), expected, atol=1e-5 if dtype != torch.float64 else 1e-12, rtol=digits)
    largest = exact.grad.abs().amax((0, 2, 3), keepdim=True) + 1e-12
    assert ((student.grad.double() / 3 - exact.grad).abs() / largest).max() < digits


def test_the_fused_error_is_differentiated_as_often_as_one_likes_but_once_deep():
    student, teacher = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    error = standardized_error(student, teacher, "mean")
    first, second = (torch.autograd.grad(error, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.abs().sum() > 0
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(torch.autograd.grad(error, student, create_graph=True)[0].sum(), student)
    with pytest.raises(ValueError, match="reduction is 'sum'; it must be one of"):
        standardized_error(student, teacher, "sum")


def test_standardized_error_is_two_minus_twice_the_correlation():
    x, y = torch.randn(2, 1, 8, 8, dtype=torch.double), torch.randn(2, 1, 8, 8, dtype=torch.double)
    r = torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1]
    assert torch.allclose(squared_error(standardize(x), standardize(y), "mean"), 2 - 2 * r, atol=1e-5)


def test_constant_channels_give_zero_and_finite_gradients():
    x = torch.full((1, 4, 1, 1), 3.0, requires_grad=True)
    y = standardize(x)
    y.square().sum().backward()
    assert torch.equal(y, torch.zeros_like(y)) and torch.isfinite(x.grad).all()


def test_half_precision_is_summed_in_float32():
    x = torch.full((1, 64, 64, 64), 1.0, dtype=torch.float16)
    assert squared_error(x, torch.zeros_like(x), "batchmean").item() == 64**3  # beyond float16's range


def test_reductions_differ_by_the_size_of_a_map():
    x, y = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    assert torch.allclose(squared_error(x, y, "batchmean"), squared_error(x, y, "mean") * 3 * 4 * 5)
    with pytest.raises(ValueError, match=r"reduction is 'sum'.*batchmean, mean"):
        squared_error(x, y, "sum")
    with pytest.raises(ValueError, match=r"mode is 'l2'.*none, standardize"):
        normalize(x, "l2")


@pytest.mark.parametrize("kind, shape", [("spatial", (4, 1, 50, 40)), ("channel", (4, 512, 1, 1))])
def test_masks_drop_the_share_that_was_asked_for(kind, shape):
    x = torch.zeros(4, 512, 50, 40)
    mask = RandomMasks(seed=3)(x, 0.65, kind)
    assert mask.shape == shape and set(mask.unique().tolist()) == {0.0, 1.0}
    assert abs(mask.mean().item() - 0.35) < 0.03
    assert RandomMasks()(x, 0.0, kind).min() == 1


def test_thresholds_keep_a_draw_that_lies_on_them():
    assert keep_mask(torch.tensor([0.25, 0.26]), 0.75, "spatial").tolist() == [True, False]
    assert keep_mask(torch.tensor([0.75, 0.74]), 0.75, "channel").tolist() == [True, False]


def test_masks_continue_from_a_state_differ_by_process_and_leave_the_global_state_alone():
    x = torch.zeros(2, 3, 8, 8)
    before = torch.get_rng_state()
    one = RandomMasks(seed=5)
    first, state = one(x, 0.5, "spatial"), one.state()
    second = one(x, 0.5, "spatial")
    other = RandomMasks(seed=9)
    other.load_state(state)
    assert torch.equal(other(x, 0.5, "spatial"), second) and not torch.equal(first, second)
    assert not torch.equal(RandomMasks(seed=5, stream=1)(x, 0.5, "spatial"), first)
    assert torch.equal(before, torch.get_rng_state())


def test_other_padding_is_cropped_at_the_bottom_right():
    s, t = torch.randn(1, 2, 4, 6), torch.randn(1, 3, 5, 5)
    a, b = align_resolution(s, t)
    assert torch.equal(a, s[..., :4, :5]) and torch.equal(b, t[..., :4, :5])


@pytest.mark.parametrize("ratio, size", [(2.0, (4, 6)), (0.5, (16, 24))])
def test_other_strides_are_resampled_to_the_students_grid(ratio, size):
    rows = torch.linspace(0, 1, size[0]).view(1, 1, -1, 1).expand(1, 1, *size)
    s = torch.zeros(1, 1, 8, 12)
    a, b = align_resolution(s, rows, ratio)
    assert a.shape == b.shape == (1, 1, 8, 12)
    assert (b[0, 0, 1:, 0] >= b[0, 0, :-1, 0]).all()  # a ramp stays a ramp
    assert torch.allclose(align_resolution(s, torch.full((1, 1, *size), 3.0), ratio)[1], torch.tensor(3.0))


def test_aligner_only_where_channels_differ():
    assert isinstance(build_aligner(tap_pair("p3", channels=(8, 8))), torch.nn.Identity)
    assert build_aligner(tap_pair("p3", channels=(8, 12)))(torch.zeros(1, 8, 3, 3)).shape == (1, 12, 3, 3)


def test_strides_too_far_apart_name_both_shapes_and_the_key():
    with pytest.raises(AlignmentError, match=r"DISTILL\.X\.TAPS\b.*64 channels at stride 4, .*256 at stride 64"):
        check_alignable("DISTILL.X.TAPS", tap_pair("p2", "p6", channels=(64, 256), strides=(4, 64)))


@pytest.mark.parametrize("ratio, size", [(1.0, (7, 8)), (2.0, (16, 16)), (0.5, (4, 4))])
def test_validity_at_other_strides(ratio, size):
    whole = torch.ones(2, 8, 8, dtype=torch.bool)
    assert align_validity(whole, ratio, size).shape == (2, *size) and align_validity(whole, ratio, size).all()
    assert not align_validity(~whole, ratio, size).any()
    half = whole.clone()
    half[:, :, 4:] = False
    aligned = align_validity(half, ratio, size)
    assert aligned[..., 0].all() and not aligned[..., -1].any()


def test_invalid_positions_do_not_count_whatever_they_hold():
    x, y = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    valid = torch.rand(2, 4, 4) < 0.5
    want = torch.stack([(x - y).square().mean(1)[n][valid[n]].sum() for n in range(2)]).sum() / valid.sum()
    assert torch.allclose(squared_error(x, y, "mean", valid), want)
    assert torch.allclose(squared_error(x, y, "batchmean", valid), want * 3 * 4 * 4)
    statistics = standardize(y, valid).transpose(0, 1)[:, valid]
    assert torch.allclose(statistics.mean(1), torch.zeros(3), atol=1e-6)
    assert torch.allclose(statistics.square().mean(1), torch.ones(3), atol=1e-4)
    assert squared_error(x, y, "mean", torch.zeros_like(valid)).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softplus_keeps_all_digits(dtype):
    x = torch.cat([torch.linspace(-700, 700, 5001), torch.linspace(-20, 20, 5001), torch.tensor([0.0, -0.0, 1e30])])
    want = np.logaddexp(0, x.double().numpy())
    small = np.finfo(np.float32 if dtype == torch.float32 else np.float64).tiny
    np.testing.assert_allclose(softplus(x.to(dtype)), want, rtol=4 * torch.finfo(dtype).eps, atol=small)
    assert softplus(torch.tensor([float("nan")])).isnan().all()


@pytest.mark.parametrize(
    ("cells", "ratio"), [(21, 0.5), (7, 0.5), (13, 0.25), (37, 14 / 8), (37, 14 / 16), (8, 2 / 3), (16, 0.5), (5, 2.0)]
)
def test_maps_of_another_stride_lie_over_the_same_pixels(cells, ratio):
    # each cell's value is its own place; a map of the student covers the same image
    places = (torch.arange(cells) + 0.5).view(1, 1, -1, 1).expand(1, 2, cells, cells)
    side = math.ceil(cells * ratio - 1e-6)
    _, aligned = align_resolution(torch.zeros(1, 3, side, side), places, ratio)
    assert aligned.shape == (1, 2, side, side)
    want = (torch.arange(side) + 0.5) / ratio
    # at the edge a map has no more to tell; smoothing moves places by a little
    inner = slice(math.ceil(ratio), side - math.ceil(ratio) - 1)
    assert torch.allclose(aligned[0, 0, inner, 0], want[inner], atol=0.08 / ratio)


@pytest.mark.parametrize("ratio", [0.01, 0.3, 1.0, 40.0])
def test_a_single_cell_stays_what_it_is(ratio):
    made = rescale(torch.full((1, 1, 1, 1), 3.0), ratio)
    assert torch.allclose(made, torch.full_like(made, 3.0))
