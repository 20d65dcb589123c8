"""Backbones: structure, errors and equivalences that the recorded fixtures do not cover."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from d2lite.config import get_cfg
from d2lite.layers import FrozenBatchNorm2d, ShapeSpec
from d2lite.modeling import (
    BACKBONE_REGISTRY,
    FPN,
    ResNet,
    SimpleFeaturePyramid,
    ViT,
    build_backbone,
    get_vit_lr_decay_rate,
    make_stage,
)
from d2lite.modeling.backbone import BasicBlock, BasicStem, BottleneckBlock, DeformBottleneckBlock
from d2lite.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from d2lite.modeling.backbone.utils import (
    add_decomposed_rel_pos,
    get_abs_pos,
    get_rel_pos,
    window_partition,
    window_unpartition,
)
from d2lite.modeling.backbone.vit import Attention, Block


def small_cfg(*options):
    cfg = get_cfg()
    cfg.merge_from_list(
        ["MODEL.RESNETS.STEM_OUT_CHANNELS", 4, "MODEL.RESNETS.RES2_OUT_CHANNELS", 8]
        + ["MODEL.RESNETS.WIDTH_PER_GROUP", 4, *options]
    )
    return cfg


def small_resnet(**kwargs):
    stages = [
        make_stage(BasicBlock, 1, in_channels=4 * 2**i, out_channels=8 * 2**i, stride_per_block=[1 if i == 0 else 2])
        for i in range(4)
    ]
    return ResNet(BasicStem(3, 4), stages, **kwargs)


FEATURES = ["res2", "res3", "res4", "res5"]


class TestResNet:
    def test_stages_deeper_than_the_features_are_dropped(self):
        net = small_resnet(out_features=["res2"])
        assert hasattr(net, "res2") and not hasattr(net, "res3")
        net = small_resnet(out_features=["res2", "res5"])
        assert list(net(torch.zeros(1, 3, 64, 64))) == ["res2", "res5"]
        assert [name for name, _ in small_resnet(out_features=["stem"]).named_children()] == ["stem"]

    def test_output_shape_agrees_with_the_output(self):
        net = small_resnet(out_features=["stem", *FEATURES])
        shapes = net.output_shape()
        for name, y in net(torch.zeros(2, 3, 64, 96)).items():
            stride = shapes[name].stride
            assert y.shape == (2, shapes[name].channels, 64 // stride, 96 // stride)

    def test_default_feature_is_the_last(self):
        assert list(small_resnet()(torch.zeros(2, 3, 32, 32))) == ["res5"]

    def test_classifier(self):
        net = small_resnet(num_classes=7, out_features=["res3", "linear"])
        outputs = net(torch.rand(2, 3, 32, 32))
        assert outputs["linear"].shape == (2, 7)
        assert list(small_resnet(num_classes=7)(torch.rand(2, 3, 32, 32))) == ["linear"]

    def test_unknown_feature(self):
        with pytest.raises(AssertionError, match="res9.*res5"):
            small_resnet(out_features=["res9"])

    def test_input_must_be_a_batch(self):
        with pytest.raises(AssertionError, match=r"\[3, 32, 32\]"):
            small_resnet()(torch.zeros(3, 32, 32))

    @pytest.mark.parametrize("freeze_at", range(7))
    def test_freeze_at(self, freeze_at):
        net = small_resnet(freeze_at=freeze_at)
        parts = [net.stem, net.res2, net.res3, net.res4, net.res5]
        for i, part in enumerate(parts, start=1):
            frozen = i <= freeze_at
            assert all(p.requires_grad is not frozen for p in part.parameters())
            assert any(isinstance(m, FrozenBatchNorm2d) for m in part.modules()) is frozen
            assert any(isinstance(m, nn.BatchNorm2d) for m in part.modules()) is not frozen

    def test_default_stages_have_the_published_size(self):
        millions = {18: 11.7, 50: 25.6, 101: 44.5, 152: 60.2}
        for depth, expected in millions.items():
            with torch.device("meta"):
                net = ResNet(BasicStem(), ResNet.make_default_stages(depth), num_classes=1000)
            assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(expected, abs=0.06)

    def test_per_block_arguments(self):
        sizes = dict(in_channels=4, out_channels=8, bottleneck_channels=2)
        blocks = make_stage(BottleneckBlock, 2, dilation_per_block=[1, 2], **sizes)
        assert [b.conv2.dilation[0] for b in blocks] == [1, 2]
        with pytest.raises(AssertionError, match="stride_per_block needs 2 values"):
            make_stage(BasicBlock, 2, in_channels=4, out_channels=8, stride_per_block=[1])

    @pytest.mark.parametrize(
        "block",
        [
            BasicBlock(4, 8, stride=2),
            BottleneckBlock(4, 4, bottleneck_channels=4, num_groups=2),
            DeformBottleneckBlock(4, 8, bottleneck_channels=4, stride=2, deform_modulated=True),
        ],
        ids=lambda block: type(block).__name__,
    )
    def test_a_block_ends_with_an_in_place_relu_of_the_sum(self, block, monkeypatch):
        block.eval()
        x = torch.randn(1, 4, 8, 8)
        expected = block(x.clone())
        inputs = []
        monkeypatch.setattr(F, "relu_", lambda y: inputs.append(y.clone()) or torch.relu_(y))
        kept = x.clone()
        block(kept)
        assert torch.equal(kept, x)
        assert inputs[-1].min() < 0
        assert torch.equal(inputs[-1].relu(), expected)

    def test_deformable_block_starts_as_the_plain_one(self):
        deformable = DeformBottleneckBlock(4, 8, bottleneck_channels=4, stride=2, dilation=2).eval()
        plain = BottleneckBlock(4, 8, bottleneck_channels=4, stride=2, dilation=2).eval()
        missing = plain.load_state_dict(deformable.state_dict(), strict=False)
        assert missing.missing_keys == []
        x = torch.randn(1, 4, 8, 8)
        torch.testing.assert_close(deformable(x), plain(x), rtol=1e-4, atol=1e-5)


class TestBuild:
    def test_dilated_res5_keeps_the_stride(self):
        net = build_backbone(
            small_cfg("MODEL.RESNETS.RES5_DILATION", 2, "MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"])
        )
        assert [s.stride for s in net.output_shape().values()] == [16, 16]
        assert all(block.conv2.dilation == (2, 2) for block in net.res5)

    def test_number_of_input_channels_follows_the_pixel_mean(self):
        net = build_backbone(small_cfg("MODEL.PIXEL_MEAN", [1.0], "MODEL.PIXEL_STD", [1.0]))
        assert net.stem.conv1.in_channels == 1
        assert build_backbone(small_cfg(), ShapeSpec(channels=5)).stem.conv1.in_channels == 5

    @pytest.mark.parametrize(
        ("options", "key"),
        [
            (["MODEL.RESNETS.DEPTH", 51], "DEPTH"),
            (["MODEL.RESNETS.RES5_DILATION", 4], "RES5_DILATION"),
            (["MODEL.RESNETS.DEPTH", 18], "RES2_OUT_CHANNELS"),
        ],
    )
    def test_impossible_resnet(self, options, key):
        with pytest.raises(AssertionError, match=f"MODEL.RESNETS.{key}"):
            build_backbone(small_cfg(*options))

    def test_unknown_name(self):
        with pytest.raises(KeyError, match="no_such_backbone"):
            build_backbone(small_cfg("MODEL.BACKBONE.NAME", "no_such_backbone"))

    def test_result_must_be_a_backbone(self):
        def build_no_backbone(cfg, input_shape):
            return nn.Identity()

        if "build_no_backbone" not in BACKBONE_REGISTRY:
            BACKBONE_REGISTRY.register(build_no_backbone)
        with pytest.raises(AssertionError, match="built a Identity"):
            build_backbone(small_cfg("MODEL.BACKBONE.NAME", "build_no_backbone"))

    def test_fpn_from_config(self):
        options = ["MODEL.FPN.IN_FEATURES", FEATURES, "MODEL.FPN.OUT_CHANNELS", 6]
        options += ["MODEL.RESNETS.OUT_FEATURES", FEATURES]
        fpn = build_backbone(small_cfg("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", *options))
        assert list(fpn.output_shape()) == ["p2", "p3", "p4", "p5", "p6"]
        assert fpn.output_shape()["p6"] == ShapeSpec(channels=6, stride=64)
        assert (fpn.size_divisibility, fpn.padding_constraints) == (32, {"square_size": 0})
        retina = build_backbone(small_cfg("MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone", *options))
        assert list(retina.output_shape())[-2:] == ["p6", "p7"]
        assert retina.top_block.p6.in_channels == 64


class TestFPN:
    def test_top_block_reads_a_bottom_up_feature_or_a_level(self):
        x = torch.randn(1, 3, 64, 64)
        fpn = FPN(small_resnet(out_features=FEATURES).eval(), FEATURES, 5, top_block=LastLevelMaxPool())
        out = fpn(x)
        assert torch.equal(out["p6"], out["p5"][:, :, ::2, ::2])
        top = LastLevelP6P7(5, 5, in_feature="p5")
        fpn = FPN(small_resnet(out_features=FEATURES).eval(), FEATURES, 5, top_block=top)
        out = fpn(x)
        assert torch.equal(out["p6"], top.p6(out["p5"]))
        top = LastLevelP6P7(64, 5)
        fpn = FPN(small_resnet(out_features=FEATURES).eval(), FEATURES, 5, top_block=top)
        assert torch.equal(fpn(x)["p6"], top.p6(fpn.bottom_up(x)["res5"]))

    def test_fuse_types(self):
        net = small_resnet(out_features=["res4", "res5"]).eval()
        x = torch.randn(1, 3, 64, 64)
        fpn = FPN(net, ["res4", "res5"], 5)
        features = net(x)
        top = fpn.fpn_lateral5(features["res5"])
        fused = fpn.fpn_lateral4(features["res4"]) + top.repeat_interleave(2, 2).repeat_interleave(2, 3)
        torch.testing.assert_close(fpn(x)["p4"], fpn.fpn_output4(fused))
        average = FPN(net, ["res4", "res5"], 5, fuse_type="avg")
        average.load_state_dict(fpn.state_dict())
        torch.testing.assert_close(average(x)["p4"], fpn.fpn_output4(fused / 2))
        with pytest.raises(AssertionError, match="FUSE_TYPE"):
            FPN(net, ["res4", "res5"], 5, fuse_type="max")

    def test_norm_replaces_the_bias(self):
        net = small_resnet(out_features=["res4", "res5"])
        assert FPN(net, ["res5"], 5).fpn_lateral5.bias is not None
        assert FPN(net, ["res5"], 64, norm="GN").fpn_output5.bias is None

    @pytest.mark.parametrize(("features", "match"), [(["res3", "res5"], "res3.*res5"), ([], "IN_FEATURES")])
    def test_impossible_features(self, features, match):
        with pytest.raises(AssertionError, match=match):
            FPN(small_resnet(out_features=FEATURES), features, 5)


class TestTransformerParts:
    @pytest.mark.parametrize("hw", [(6, 6), (5, 7), (1, 2)])
    def test_windows_round_trip(self, hw):
        x = torch.randn(2, *hw, 4)
        windows, padded = window_partition(x, 3)
        assert windows.shape == (2 * padded[0] * padded[1] // 9, 3, 3, 4)
        assert torch.equal(windows[0, : hw[0], : hw[1]], x[0, :3, :3])
        assert torch.equal(window_unpartition(windows, 3, padded, hw), x)

    def test_relative_positions(self):
        table = torch.arange(7.0)[:, None]
        assert get_rel_pos(4, 4, table)[..., 0].tolist() == [
            [3, 2, 1, 0],
            [4, 3, 2, 1],
            [5, 4, 3, 2],
            [6, 5, 4, 3],
        ]
        # A query twice as coarse as the keys steps over two of them.
        assert get_rel_pos(2, 4, table)[..., 0].tolist() == [[3, 2, 1, 0], [5, 4, 3, 2]]
        assert get_rel_pos(6, 6, table).shape == (6, 6, 1)

    def test_attention_equals_its_definition(self):
        attention = Attention(12, num_heads=3, use_rel_pos=True, rel_pos_zero_init=False, input_size=(4, 5))
        x = torch.randn(2, 4, 5, 12)
        qkv = attention.qkv(x).view(2, 20, 3, 3, 4).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, 6, 20, 4).unbind()
        logits = q @ k.mT / 2
        logits = add_decomposed_rel_pos(logits, q, attention.rel_pos_h, attention.rel_pos_w, (4, 5), (4, 5))
        y = (logits.softmax(-1) @ v).view(2, 3, 4, 5, 4).permute(0, 2, 3, 1, 4).reshape(2, 4, 5, 12)
        torch.testing.assert_close(attention(x), attention.proj(y))
        attention(x).sum().backward()
        assert attention.rel_pos_h.grad.abs().max() > 0

    def test_absolute_positions(self):
        table = torch.randn(1, 10, 6)
        assert torch.equal(get_abs_pos(table, True, (3, 3)), table[:, 1:].view(1, 3, 3, 6))
        assert get_abs_pos(table, True, (2, 5)).shape == (1, 2, 5, 6)
        with pytest.raises(AssertionError, match="square"):
            get_abs_pos(table, False, (3, 3))

    def test_residual_block_starts_as_the_identity(self):
        x = torch.randn(2, 4, 5, 8)
        with_residual, without = Block(8, 2, use_residual_block=True).eval(), Block(8, 2).eval()
        without.load_state_dict(with_residual.state_dict(), strict=False)
        torch.testing.assert_close(with_residual(x), without(x))

    def test_drop_path_drops_whole_samples(self):
        torch.manual_seed(0)
        block = Block(8, 2, drop_path=0.5).train()
        x = torch.randn(64, 2, 2, 8)
        unchanged = (block(x) == x).flatten(1).all(1).sum()
        assert 4 < unchanged < 32
        assert not (block.eval()(x) == x).flatten(1).all(1).any()


class TestViT:
    sizes = dict(img_size=64, embed_dim=8, depth=2, num_heads=2, use_rel_pos=True, pretrain_img_size=64)

    def test_recomputed_blocks_give_the_same_gradients(self):
        plain = ViT(**self.sizes)
        recomputed = ViT(**self.sizes, use_act_checkpoint=True)
        recomputed.load_state_dict(plain.state_dict())
        x = torch.randn(1, 3, 64, 32)
        for net in (plain, recomputed):
            net.train()(x)["last_feat"].square().sum().backward()
        for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)

    def test_without_positions(self):
        net = ViT(**{**self.sizes, "use_rel_pos": False}, use_abs_pos=False, out_feature="x")
        assert net.pos_embed is None
        assert net.output_shape() == {"x": ShapeSpec(channels=8, stride=16)}
        assert net(torch.rand(0, 3, 32, 48))["x"].shape == (0, 8, 2, 3)

    def test_pyramid(self):
        pyramid = SimpleFeaturePyramid(
            ViT(**self.sizes), "last_feat", 6, (2.0, 1.0, 0.5), LastLevelMaxPool(), norm="", square_pad=64
        )
        shapes = pyramid.output_shape()
        assert [(k, s.stride) for k, s in shapes.items()] == [("p3", 8), ("p4", 16), ("p5", 32), ("p6", 64)]
        assert pyramid.padding_constraints["square_size"] == 64
        for name, y in pyramid(torch.rand(1, 3, 64, 64)).items():
            assert y.shape == (1, 6, 64 // shapes[name].stride, 64 // shapes[name].stride)

    def test_pyramid_scales(self):
        with pytest.raises(NotImplementedError, match="0.25"):
            SimpleFeaturePyramid(ViT(**self.sizes), "last_feat", 6, (0.5, 0.25))
        with pytest.raises(AssertionError, match="double"):
            SimpleFeaturePyramid(ViT(**self.sizes), "last_feat", 6, (4.0, 1.0))

    def test_learning_rate_falls_toward_the_input(self):
        names = ["patch_embed.proj.bias", "blocks.0.norm1.bias", "blocks.1.attn.rel_pos_h", "norm.weight"]
        rates = [get_vit_lr_decay_rate("backbone.net." + name, 0.5, 2) for name in names]
        assert rates == [0.125, 0.25, 0.5, 1]
        assert get_vit_lr_decay_rate("roi_heads.pos_embed", 0.5, 2) == 1
