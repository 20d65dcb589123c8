"""Layers: behavior at the edges that the recorded fixtures do not cover."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.ops import deform_conv2d

from d2lite.layers import (
    CNNBlockBase,
    Conv2d,
    CycleBatchNormList,
    DeformConv,
    FrozenBatchNorm2d,
    LayerNorm,
    ModulatedDeformConv,
    NaiveSyncBatchNorm,
    ROIAlign,
    ShapeSpec,
    batched_nms,
    cat,
    ciou_loss,
    cross_entropy,
    diou_loss,
    get_norm,
    mask_ops,
    nms,
    nonzero_tuple,
    paste_masks_in_image,
)
from d2lite.layers.stem_pool import stem_pool


def random_norm(channels: int, cls: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    norm = cls(channels)
    for name in ("weight", "bias", "running_mean"):
        getattr(norm, name).data.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


def test_shape_spec_is_a_value():
    assert ShapeSpec(channels=3) == ShapeSpec(3, None, None, None)
    assert ShapeSpec(channels=3, stride=4) != ShapeSpec(channels=3, stride=8)


class TestFrozenBatchNorm:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_result_has_the_type_of_the_input(self, dtype, requires_grad):
        x = torch.rand(1, 10, 4, 4, dtype=dtype).requires_grad_(requires_grad)
        assert random_norm(10, FrozenBatchNorm2d)(x).dtype == dtype

    def test_value_and_gradient_are_those_of_batch_norm_in_eval_mode(self):
        bn = random_norm(5).eval()
        frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(bn)
        x, y = torch.randn(2, 2, 5, 3, 4).unbind()
        x.requires_grad_(True)
        gradient = torch.autograd.grad((frozen(x) * y).sum(), x)[0]
        expected = torch.autograd.grad((bn(x) * y).sum(), x)[0]
        torch.testing.assert_close(frozen(x), bn(x))
        torch.testing.assert_close(gradient, expected)

    def test_keeps_nothing_of_the_input_for_the_backward_pass(self):
        saved = []
        x = torch.randn(2, 5, 3, 4, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()), lambda t: t):
            random_norm(5, FrozenBatchNorm2d)(x)
        assert max(saved) == 5

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_behind_a_convolution_it_takes_no_memory_and_changes_no_bit(self, dtype):
        conv = Conv2d(3, 5, 3, norm=random_norm(5, FrozenBatchNorm2d)).to(dtype)
        outputs, x = [], torch.randn(2, 3, 6, 7, dtype=dtype, requires_grad=True)
        convolve = conv._conv_forward
        conv._conv_forward = lambda *args: outputs.append(convolve(*args)) or outputs[-1]
        y = conv(x)
        assert y.data_ptr() == outputs[0].data_ptr()
        apart = conv.norm(convolve(x, conv.weight, conv.bias))
        assert torch.equal(y, apart)
        leaves, gradient = [x, conv.weight, conv.bias], torch.randn_like(y)
        found, expected = (torch.autograd.grad(z, leaves, gradient) for z in (y, apart))
        assert all(map(torch.equal, found, expected))

    @pytest.mark.parametrize("hook", ["register_forward_pre_hook", "register_forward_hook"])
    def test_what_a_hook_has_kept_is_not_overwritten(self, hook):
        conv = Conv2d(3, 5, 3, norm=random_norm(5, FrozenBatchNorm2d))
        kept, x = [], torch.randn(2, 3, 6, 7)
        getattr(conv.norm, hook)(lambda module, args, *output: kept.append(args[0]))
        conv(x)
        assert torch.equal(kept[0], torch.conv2d(x, conv.weight, conv.bias))

    def test_alone_it_overwrites_nothing(self):
        x = torch.randn(2, 5, 3, 4)
        before = x.clone()
        random_norm(5, FrozenBatchNorm2d)(x)
        assert torch.equal(x, before)

    def test_conversion_copies_tensors_and_leaves_the_rest(self):
        bn = random_norm(4)
        bn.num_batches_tracked += 7
        net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(bn, nn.GroupNorm(2, 4)))
        converted = FrozenBatchNorm2d.convert_frozen_batchnorm(net)
        assert converted is net
        frozen = net[1][0]
        assert isinstance(net[1][1], nn.GroupNorm) and isinstance(frozen, FrozenBatchNorm2d)
        assert frozen.num_batches_tracked == 7
        assert set(frozen.state_dict()) == set(bn.state_dict())
        bn.running_mean.add_(1)
        assert not torch.equal(bn.running_mean, frozen.running_mean)
        addresses = {b.data_ptr() for b in frozen.buffers()}
        assert len(addresses) == 5

    def test_conversion_keeps_a_shared_norm_shared(self):
        bn = nn.BatchNorm2d(2)
        net = FrozenBatchNorm2d.convert_frozen_batchnorm(nn.ModuleList([bn, nn.ReLU(), nn.Sequential(bn)]))
        assert net[0] is net[2][0]
        assert isinstance(net[0], FrozenBatchNorm2d)

    def test_conversion_of_a_bare_norm_returns_the_new_one(self):
        for norm in (nn.BatchNorm2d(3), nn.SyncBatchNorm(3), NaiveSyncBatchNorm(3)):
            assert isinstance(FrozenBatchNorm2d.convert_frozen_batchnorm(norm), FrozenBatchNorm2d)

    def test_strict_round_trip(self):
        source, target = random_norm(4, FrozenBatchNorm2d), FrozenBatchNorm2d(4)
        target.load_state_dict(source.state_dict())
        x = torch.randn(1, 4, 2, 2)
        assert torch.equal(source(x), target(x))

    def test_a_current_state_dict_without_statistics_is_an_error(self):
        state = FrozenBatchNorm2d(4).state_dict()
        del state["running_mean"]
        with pytest.raises(RuntimeError, match="running_mean"):
            FrozenBatchNorm2d(4).load_state_dict(state)

    def test_freezing_a_block(self):
        class Block(CNNBlockBase):
            def __init__(self):
                super().__init__(3, 4, 1)
                self.conv = Conv2d(3, 4, 1, norm=nn.BatchNorm2d(4))

        block = Block()
        assert block.freeze() is block
        assert isinstance(block.conv.norm, FrozenBatchNorm2d)
        assert not any(p.requires_grad for p in block.parameters())


class TestNorms:
    def test_names(self):
        assert get_norm("", 8) is None
        assert get_norm(None, 8) is None
        assert isinstance(get_norm("naiveSyncBN", 8), NaiveSyncBatchNorm)
        assert isinstance(get_norm("nnSyncBN", 8), nn.SyncBatchNorm)
        assert isinstance(get_norm("LN", 8), LayerNorm)
        assert get_norm(lambda channels: nn.GroupNorm(4, channels), 8).num_groups == 4

    def test_unknown_name_lists_the_known_ones(self):
        with pytest.raises(KeyError, match="BatchNorm.*FrozenBN"):
            get_norm("BatchNorm", 8)

    def test_layer_norm_normalizes_each_pixel(self):
        norm = LayerNorm(6)
        norm.weight.data.normal_()
        norm.bias.data.normal_()
        x = torch.randn(2, 6, 3, 4)
        centered = x - x.mean(1, keepdim=True)
        expected = centered / (centered.square().mean(1, keepdim=True) + 1e-6).sqrt()
        expected = expected * norm.weight[:, None, None] + norm.bias[:, None, None]
        torch.testing.assert_close(norm(x), expected)
        assert norm(x[:0]).shape == (0, 6, 3, 4)

    def test_cycle_uses_the_norms_in_turn_with_one_affine_transform(self):
        norms = CycleBatchNormList(2, num_features=3).eval()
        norms[0].running_mean.fill_(1)
        norms[1].running_mean.fill_(5)
        norms.weight.data.fill_(2)
        norms.bias.data.fill_(3)
        x = torch.zeros(1, 3, 1, 1)
        outputs = [norms(x)[0, 0, 0, 0].item() for _ in range(3)]
        assert outputs == pytest.approx([1, -7, 1], abs=1e-3)
        assert set(dict(norms.named_parameters())) == {"weight", "bias"}

    def test_cycle_without_affine_transform(self):
        norms = CycleBatchNormList(3, num_features=3, affine=False)
        assert len(list(norms.parameters())) == 0
        assert norms(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)


SYNC_BN_CASES = (("", (2, 2)), ("N", (2, 3)), ("N", (2, 0)))


def sync_bn_step(norm: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradient of a loss that treats all channels and values differently."""
    x = x.clone().requires_grad_(True)
    y = norm(x)
    y.square().mul(torch.arange(3.0).view(3, 1, 1)).sin().sum().backward()
    return y.detach(), x.grad


def run_sync_bn(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    results = []
    for (mode, sizes), x in zip(SYNC_BN_CASES, torch.load(f"{folder}/inputs.pt"), strict=True):
        norm = NaiveSyncBatchNorm(3, stats_mode=mode)
        y, gradient = sync_bn_step(norm, x.split(sizes)[rank])
        results.append((y, gradient, norm.running_mean, norm.running_var))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_naive_sync_bn_equals_batch_norm_on_the_whole_batch(tmp_path):
    torch.manual_seed(0)
    inputs = [torch.randn(sum(sizes), 3, 4, 5) for _, sizes in SYNC_BN_CASES]
    torch.save(inputs, tmp_path / "inputs.pt")
    torch.multiprocessing.spawn(run_sync_bn, (str(tmp_path),), nprocs=2)
    results = zip(inputs, torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "1.pt"), strict=True)
    for x, *parts in results:
        norm = nn.BatchNorm2d(3)
        y, gradient = sync_bn_step(norm, x)
        torch.testing.assert_close(torch.cat([p[0] for p in parts]), y)
        torch.testing.assert_close(torch.cat([p[1] for p in parts]), gradient, rtol=1e-4, atol=1e-5)
        for part in parts:
            torch.testing.assert_close(part[2], norm.running_mean)
            # Batch norm stores the unbiased variance, this layer the biased one.
            n = x.numel() / 3
            torch.testing.assert_close(part[3] - 0.9, (norm.running_var - 0.9) * (n - 1) / n)


class TestWrappers:
    def test_conv_applies_norm_then_activation(self):
        conv = Conv2d(2, 4, 3, padding=1, norm=random_norm(4).eval(), activation=F.relu)
        x = torch.randn(1, 2, 5, 5)
        plain = F.conv2d(x, conv.weight, conv.bias, padding=1)
        torch.testing.assert_close(conv(x), conv.norm(plain).relu())

    def test_conv_on_an_empty_batch(self):
        x = torch.randn(0, 3, 9, 7, requires_grad=True)
        conv = Conv2d(3, 4, 3, stride=2, norm=FrozenBatchNorm2d(4))
        y = conv(x)
        assert y.shape == (0, 4, 4, 3)
        y.sum().backward()
        assert conv.weight.grad.abs().sum() == 0

    def test_cat_of_one_is_no_copy(self):
        x = torch.zeros(2)
        assert cat([x]) is x
        assert cat((x, x), dim=0).shape == (4,)
        with pytest.raises(AssertionError, match="list or tuple"):
            cat(x)

    def test_cross_entropy_without_targets_is_a_differentiable_zero(self):
        logits = torch.randn(0, 5, requires_grad=True)
        loss = cross_entropy(logits, torch.zeros(0, dtype=torch.long), reduction="mean")
        loss.backward()
        assert loss.item() == 0
        assert logits.grad.shape == (0, 5)

    def test_cross_entropy_with_targets(self):
        logits, target = torch.randn(3, 5), torch.tensor([0, 4, 2])
        for reduction in ("mean", "sum", "none"):
            expected = F.cross_entropy(logits, target, reduction=reduction)
            assert torch.equal(cross_entropy(logits, target, reduction=reduction), expected)

    def test_nonzero_tuple(self):
        assert nonzero_tuple(torch.tensor(3))[0].tolist() == [0]
        assert nonzero_tuple(torch.tensor(0))[0].tolist() == []
        rows, columns = nonzero_tuple(torch.tensor([[0, 1], [2, 0]]))
        assert (rows.tolist(), columns.tolist()) == ([0, 1], [1, 0])


class TestNms:
    def test_equals_plain_nms_per_class(self):
        generator = torch.Generator().manual_seed(0)
        for n in (200, 1500):  # fewer and more than the operator handles in one go
            corner = torch.rand(n, 2, generator=generator) * 100 - 50
            boxes = torch.cat((corner, corner + torch.rand(n, 2, generator=generator) * 40), 1)
            scores = torch.rand(n, generator=generator)
            classes = torch.randint(4, (n,), generator=generator)
            kept = torch.cat(
                [i[nms(boxes[i], scores[i], 0.5)] for i in ((classes == c).nonzero()[:, 0] for c in range(4))]
            )
            expected = kept[scores[kept].argsort(descending=True)]
            assert torch.equal(batched_nms(boxes, scores, classes, 0.5), expected)

    def test_half_precision_boxes_of_many_classes_stay_apart(self):
        boxes = torch.tensor([[500.0, 500, 600, 600]]).half().repeat(80, 1)
        kept = batched_nms(boxes, torch.rand(80).half(), torch.arange(80), 0.5)
        assert len(kept) == 80


class TestRoiAlign:
    def test_aligned_sampling_of_a_ramp(self):
        ramp = torch.arange(8.0).expand(1, 1, 8, 8)
        roi = torch.tensor([[0.0, 2, 2, 6, 6]])
        # Pixel k has its center at k + 0.5, so the cells centered at 3 and 5 show 2.5 and 4.5.
        assert ROIAlign((2, 2), 1.0, 0)(ramp, roi)[0, 0, 0].tolist() == [2.5, 4.5]
        assert ROIAlign((2, 2), 1.0, 0, aligned=False)(ramp, roi)[0, 0, 0].tolist() == [3.0, 5.0]

    def test_empty_inputs(self):
        pool = ROIAlign(7, 0.25, 0)
        assert pool(torch.rand(2, 3, 8, 8), torch.zeros(0, 5)).shape == (0, 3, 7, 7)
        assert pool(torch.rand(0, 3, 8, 8), torch.zeros(0, 5)).shape == (0, 3, 7, 7)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_boxes_keep_their_precision_on_maps_of_half_precision(self, dtype):
        generator = torch.Generator().manual_seed(0)
        maps = torch.randn(1, 4, 256, 256, generator=generator).to(dtype)
        corner = 700 + 250 * torch.rand(20, 2, generator=generator)
        rois = torch.cat((torch.zeros(20, 1), corner, corner + 16), dim=1)
        pooled = ROIAlign(7, 0.25, 0)(maps, rois)
        assert pooled.dtype == dtype
        expected = ROIAlign(7, 0.25, 0)(maps.float(), rois)
        torch.testing.assert_close(pooled.float(), expected, rtol=0.01, atol=0.01)

    def test_rois_need_a_batch_index(self):
        with pytest.raises(AssertionError, match=r"\(R, 5\)"):
            ROIAlign(7, 0.25, 0)(torch.rand(1, 3, 8, 8), torch.zeros(1, 4))


class TestDeformConv:
    def test_no_offset_is_a_plain_convolution(self):
        x = torch.randn(2, 4, 7, 6)
        conv = DeformConv(4, 6, kernel_size=3, stride=2, padding=1, groups=2, deformable_groups=2)
        expected = F.conv2d(x, conv.weight, stride=2, padding=1, groups=2)
        torch.testing.assert_close(conv(x, torch.zeros(2, 36, 4, 3)), expected, rtol=1e-4, atol=1e-5)

    def test_offsets_are_y_then_x_and_the_mask_scales(self):
        x = torch.randn(1, 1, 5, 5)
        conv = ModulatedDeformConv(1, 1, kernel_size=1, norm=nn.Identity(), activation=lambda y: -y)
        conv.weight.data.fill_(1)
        offset = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 5, 5)
        y = conv(x, offset, torch.full((1, 1, 5, 5), 0.5))
        torch.testing.assert_close(y[..., :4, :], -0.5 * x[..., 1:, :])
        assert y[..., 4, :].abs().sum() == 0

    @pytest.mark.parametrize(("offset", "mask", "name"), [(9, 9, "offset"), (18, 8, "mask")])
    def test_wrong_number_of_channels(self, offset, mask, name):
        conv = ModulatedDeformConv(1, 1, kernel_size=3, padding=1)
        with pytest.raises(RuntimeError, match=f"{name} has"):
            conv(torch.zeros(1, 1, 3, 3), torch.zeros(1, offset, 3, 3), torch.zeros(1, mask, 3, 3))

    @pytest.mark.parametrize("modulated", [False, True])
    def test_on_the_cpu_it_is_torchvisions_operator(self, modulated):
        torch.manual_seed(0)
        sizes = dict(stride=2, padding=2, dilation=2, groups=2, deformable_groups=3)
        conv = (ModulatedDeformConv if modulated else DeformConv)(6, 8, kernel_size=3, **sizes).double()
        x = torch.randn(2, 6, 9, 11, dtype=torch.double, requires_grad=True)
        offset = (3 * torch.randn(2, 54, 5, 6, dtype=torch.double)).requires_grad_()  # many outside the map
        mask = torch.rand(2, 27, 5, 6, dtype=torch.double, requires_grad=True)
        inputs = [x, offset, *([mask] if modulated else [])]
        found = conv(*inputs)
        expected = deform_conv2d(x, offset, conv.weight, conv.bias, 2, 2, 2, mask if modulated else None)
        torch.testing.assert_close(found, expected)
        parts = [*inputs, *conv.parameters()]
        gradients = (torch.autograd.grad(y.square().sum(), parts) for y in (found, expected))
        for ours, theirs in zip(*gradients):
            torch.testing.assert_close(ours, theirs)

    def test_half_precision_and_wrong_sizes(self):
        conv, x, offset = DeformConv(2, 3, kernel_size=3), torch.rand(1, 2, 5, 4), torch.rand(1, 18, 3, 2)
        half = conv(x.bfloat16(), offset.bfloat16())
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), conv(x, offset), rtol=0.1, atol=0.1)
        with pytest.raises(RuntimeError, match="offset is of size 5 x 4, the output of 3 x 2"):
            conv(x, torch.rand(1, 18, 5, 4))

    def test_empty_batch(self):
        conv = DeformConv(2, 3, kernel_size=3, padding=1)
        assert conv(torch.zeros(0, 2, 5, 4), torch.zeros(0, 18, 5, 4)).shape == (0, 3, 5, 4)

    def test_repr(self):
        assert repr(DeformConv(3, 10, kernel_size=3, padding=1, deformable_groups=2)) == (
            "DeformConv(in_channels=3, out_channels=10, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), "
            "dilation=(1, 1), groups=1, deformable_groups=2, bias=False)"
        )
        assert repr(ModulatedDeformConv(3, 10, kernel_size=3, padding=1, deformable_groups=2)) == (
            "ModulatedDeformConv(in_channels=3, out_channels=10, kernel_size=(3, 3), stride=1, padding=1, "
            "dilation=1, groups=1, deformable_groups=2, bias=True)"
        )

    def test_bias_is_for_the_modulated_version(self):
        with pytest.raises(AssertionError, match="ModulatedDeformConv"):
            DeformConv(3, 4, 3, bias=True)


def paste_by_sampling(mask: torch.Tensor, box: list[float], height: int, width: int) -> torch.Tensor:
    """The definition: sample the mask bilinearly at the center of every pixel of the image."""
    x = (torch.arange(width) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
    y = (torch.arange(height) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
    grid = torch.stack((x.expand(height, width), y[:, None].expand(height, width)), -1)
    return F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]


class TestPasteMasks:
    boxes = ((3.3, 2.1, 20.7, 17.9), (-6.0, -5.0, 9.5, 30.0), (0.0, 0.0, 24.0, 18.0), (40.0, 3.0, 50.0, 9.0))

    def paste_both_ways(self, masks, boxes, shape, threshold):
        on_cpu = paste_masks_in_image(masks, boxes, shape, threshold)
        rows = mask_ops._interpolation_weights(boxes[:, 1], boxes[:, 3], shape[0], masks.shape[-1])
        columns = mask_ops._interpolation_weights(boxes[:, 0], boxes[:, 2], shape[1], masks.shape[-1])
        return on_cpu, mask_ops._paste_chunks(masks, rows, columns, threshold)

    @pytest.mark.parametrize("max_bytes", [1, 2**29])
    def test_equals_bilinear_sampling(self, monkeypatch, max_bytes):
        monkeypatch.setattr(mask_ops, "_MAX_CHUNK_BYTES", max_bytes)
        masks = torch.rand(len(self.boxes), 28, 28)
        expected = [paste_by_sampling(m, b, 18, 24) for m, b in zip(masks, self.boxes, strict=True)]
        expected = torch.stack(expected) * 255
        for pasted in self.paste_both_ways(masks, torch.tensor(self.boxes), (18, 24), -1):
            assert pasted.dtype == torch.uint8
            assert (pasted - expected).abs().max() <= 1.001

    def test_binary_masks(self):
        masks = torch.zeros(2, 4, 4)
        masks[0] = 1
        masks[1, :, :2] = 1
        boxes = torch.tensor([[2.0, 1, 6, 5], [2, 1, 6, 5]])
        expected = torch.zeros(2, 8, 9, dtype=torch.bool)
        expected[0, 1:5, 2:6] = True
        expected[1, 1:5, 2:4] = True
        for pasted in self.paste_both_ways(masks, boxes, (8, 9), 0.5):
            assert torch.equal(pasted, expected)

    def test_a_box_without_extent_stays_where_it_is(self):
        boxes = torch.tensor([[5.5, 2.0, 5.5, 6.0]])
        for pasted in self.paste_both_ways(torch.ones(1, 4, 4), boxes, (8, 12), 0.5):
            assert pasted[0, 2:6, 5].all()
            assert pasted[0, :, :4].sum() == pasted[0, :, 8:].sum() == 0

    def test_a_box_that_is_not_finite_pastes_nothing(self):
        boxes = torch.tensor([[float("nan"), 2.0, 5.5, 6.0]])
        for pasted in self.paste_both_ways(torch.ones(1, 4, 4), boxes, (8, 12), 0.5):
            assert pasted.sum() == 0

    def test_no_masks(self):
        assert paste_masks_in_image(torch.zeros(0, 28, 28), torch.zeros(0, 4), (5, 6)).shape == (0, 5, 6)

    def test_masks_must_be_square_and_match_the_boxes(self):
        with pytest.raises(AssertionError, match="square"):
            paste_masks_in_image(torch.zeros(1, 28, 14), torch.zeros(1, 4), (5, 6))
        with pytest.raises(AssertionError, match="2 masks but 1 boxes"):
            paste_masks_in_image(torch.zeros(2, 14, 14), torch.zeros(1, 4), (5, 6))


class TestBoxLosses:
    @pytest.mark.parametrize("loss", [diou_loss, ciou_loss])
    def test_equal_boxes_and_no_boxes(self, loss):
        boxes = torch.tensor([[1.0, 2, 5, 9], [0, 0, 1, 1]])
        assert loss(boxes, boxes).abs().max() < 1e-6
        empty = torch.zeros(0, 4, requires_grad=True)
        for reduction in ("mean", "sum"):
            assert loss(empty, torch.zeros(0, 4), reduction=reduction).item() == 0
        assert loss(empty, torch.zeros(0, 4)).shape == (0,)

    def test_distance_term(self):
        a, b = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[4.0, 0, 6, 2]])
        # Centers 4 apart, enclosing box 6 x 2, equal shapes.
        assert diou_loss(a, b).item() == pytest.approx(1 + 16 / 40)
        assert ciou_loss(a, b).item() == pytest.approx(1 + 16 / 40)


def test_torchscript_compiles_mask_pasting():
    masks, boxes = torch.rand(2, 28, 28), torch.tensor([[1.0, 1.0, 5.0, 5.0], [3.0, 3.0, 30.0, 30.0]])
    scripted = torch.jit.script(paste_masks_in_image)
    assert torch.equal(scripted(masks, boxes, (50, 50)), paste_masks_in_image(masks, boxes, (50, 50)))


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (7, 10), (16, 9)])
def test_stem_pool_is_a_max_pool_with_and_without_gradient(size):
    x = torch.randn(2, 3, *size)
    x[0, 0, 0, 0] = float("nan")
    want = F.max_pool2d(x, 3, 2, 1)
    for channels in (x, x.to(memory_format=torch.channels_last)):
        assert torch.equal(stem_pool(channels).nan_to_num(7), want.nan_to_num(7))
    trained = torch.randn(2, 3, *size, requires_grad=True)
    (gradient,) = torch.autograd.grad(stem_pool(trained).square().sum(), trained)
    (reference,) = torch.autograd.grad(F.max_pool2d(trained, 3, 2, 1).square().sum(), trained)
    assert torch.equal(gradient, reference)
