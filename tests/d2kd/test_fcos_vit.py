"""FCOS and ViTDet from YAML: parameter names, numbers, taps, distillation, learning rates by layer, errors."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from models import FASTER_RCNN, NARROW, batch, config, model, write_teacher
from runs import ROOT

import d2kd.modeling as d2kd_modeling
from d2kd.engine.optimizer import build_optimizer
from d2kd.modeling import FeatureTaps, build_distilled_model, build_network, num_classes
from d2kd.modeling.padding import ImageSizeError
from d2kd.modeling.taps import tap_names
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, META_ARCH_REGISTRY, ResNet, build_backbone, build_model
from detectron2.modeling.backbone import BottleneckBlock
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicStem
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage

FCOS_R50 = {
    "MODEL.META_ARCHITECTURE": "FCOS",
    "MODEL.BACKBONE.NAME": "build_fcos_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.FCOS.NUM_CLASSES": 3,
    "MODEL.FCOS.NUM_CONVS": 1,
}
#: The recorded backbone of tests/data/parity/09_vit_sfp.
VIT = {
    "MODEL.BACKBONE.NAME": "build_vit_sfp_backbone",
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.FPN.NORM": "LN",
    "MODEL.VIT.IMG_SIZE": 128,
    "MODEL.VIT.SQUARE_PAD": 128,
    "MODEL.VIT.EMBED_DIM": 32,
    "MODEL.VIT.DEPTH": 4,
    "MODEL.VIT.NUM_HEADS": 4,
    "MODEL.VIT.WINDOW_SIZE": 3,
    "MODEL.VIT.WINDOW_BLOCK_INDEXES": [0, 2],
}
VIT_RCNN = {**FASTER_RCNN, **VIT}
del VIT_RCNN["MODEL.RESNETS.OUT_FEATURES"], VIT_RCNN["MODEL.FPN.IN_FEATURES"]


def losses(net: torch.nn.Module) -> dict:
    torch.manual_seed(3)
    with EventStorage():
        return net.train()(batch())


def explicit_fcos(cfg: CfgNode) -> FCOS:
    """FCOS as Detectron2's own constructors make it."""
    stem = BasicStem(3, NARROW["MODEL.RESNETS.STEM_OUT_CHANNELS"], "BN")
    stages, channels, width = [], NARROW["MODEL.RESNETS.STEM_OUT_CHANNELS"], NARROW["MODEL.RESNETS.WIDTH_PER_GROUP"]
    for i, blocks in enumerate((3, 4, 6, 3)):
        arguments = {"bottleneck_channels": width << i, "norm": "BN", "stride_in_1x1": False}
        strides = [1 if i == 0 else 2] + [1] * (blocks - 1)
        stage = ResNet.make_stage(
            BottleneckBlock, blocks, stride_per_block=strides, in_channels=channels, out_channels=16 << i, **arguments
        )
        stages.append(stage)
        channels = 16 << i
    levels = ["res3", "res4", "res5"]
    backbone = FPN(ResNet(stem, stages, out_features=levels), levels, 32, top_block=LastLevelP6P7(32, 32, "p5"))
    shapes = [ShapeSpec(channels=32, stride=stride) for stride in (8, 16, 32, 64, 128)]
    return FCOS(
        backbone=backbone,
        head=FCOSHead(input_shape=shapes, num_classes=3, conv_dims=[32], norm="GN"),
        head_in_features=["p3", "p4", "p5", "p6", "p7"],
        num_classes=3,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )


def test_fcos_from_yaml_is_detectron2s_fcos():
    cfg = config(FCOS_R50)
    ours, theirs = model(cfg), explicit_fcos(cfg)
    assert isinstance(ours, FCOS) and type(ours).__name__ == "FCOS"
    theirs.load_state_dict(ours.state_dict(), strict=True)
    expected = losses(theirs)
    for name, value in losses(ours).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    with torch.no_grad():
        ours.head.cls_score.bias.fill_(1.0)
        theirs.head.cls_score.bias.fill_(1.0)
        (a, _), (b, _) = ours.eval()(batch()), theirs.eval()(batch())
    assert len(a["instances"]) > 10
    assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)


def test_fcos_reads_its_keys():
    cfg = config(
        FCOS_R50,
        MODEL__FCOS__SCORE_THRESH_TEST=0.5,
        MODEL__FCOS__NMS_THRESH_TEST=0.4,
        MODEL__FCOS__TOPK_CANDIDATES_TEST=7,
        MODEL__FCOS__CENTER_SAMPLING_RADIUS=0.0,
        MODEL__FCOS__FOCAL_LOSS_ALPHA=0.3,
        MODEL__FCOS__FOCAL_LOSS_GAMMA=1.0,
        MODEL__FCOS__PRIOR_PROB=0.5,
        MODEL__FCOS__IN_FEATURES=["p4", "p5"],
        MODEL__FCOS__NORM="",
        TEST__DETECTIONS_PER_IMAGE=9,
    )
    net = model(cfg)
    values = (net.test_score_thresh, net.test_nms_thresh, net.test_topk_candidates, net.center_sampling_radius)
    assert values == (0.5, 0.4, 7, 0.0) and (net.focal_loss_alpha, net.focal_loss_gamma) == (0.3, 1.0)
    assert net.head_in_features == ["p4", "p5"] and net.max_detections_per_image == 9
    assert net.head.cls_score.bias.abs().max() == 0
    assert not any(isinstance(m, torch.nn.GroupNorm) for m in net.modules())
    assert num_classes(cfg) == ("MODEL.FCOS.NUM_CLASSES", 3)


def test_fcos_level_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match=r"MODEL\.FCOS\.IN_FEATURES names p2.*p3, p4, p5, p6, p7"):
        model(config(FCOS_R50, MODEL__FCOS__IN_FEATURES=["p2", "p3"]))


def test_importing_d2kd_is_enough_to_build_from_yaml():
    program = """
import d2kd
from detectron2.config import get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
cfg = get_cfg()
d2kd.add_distill_config(cfg)
assert "FCOS" in META_ARCH_REGISTRY and "FeatureMimic" in d2kd.DISTILLERS
assert "build_vit_sfp_backbone" in BACKBONE_REGISTRY
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_importing_again_registers_nothing_twice():
    import importlib

    for module in (d2kd_modeling.meta_arch.fcos, d2kd_modeling.backbone.vit, d2kd_modeling.backbone.fcos_fpn):
        importlib.reload(module)
    assert "FCOS" in META_ARCH_REGISTRY and "build_vit_sfp_backbone" in BACKBONE_REGISTRY


def test_vit_from_yaml_has_vitdets_names_and_recorded_numbers(data_dir):
    folder = data_dir / "parity/09_vit_sfp"
    backbone = build_backbone(config(VIT)).eval()
    backbone.load_state_dict(torch.load(folder / "weights.pth", weights_only=True), strict=True)
    names = {name.split(".")[0] for name in backbone.state_dict()}
    assert names == {"net", "simfp_2", "simfp_3", "simfp_4", "simfp_5"}
    inputs, expected = np.load(folder / "inputs.npz"), np.load(folder / "expected.npz")
    for name in ("input0", "input1"):
        with torch.no_grad():
            features = backbone(torch.from_numpy(inputs[name]))
        for level, value in features.items():
            np.testing.assert_allclose(value.numpy(), expected[f"feat_{name}/{level}"], rtol=1e-4, atol=1e-4)
    assert backbone.padding_constraints["square_size"] == 128


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"MODEL__VIT__NUM_HEADS": 5},
            r"MODEL\.VIT\.EMBED_DIM is 32; it must be a multiple of MODEL\.VIT\.NUM_HEADS, 5",
        ),
        (
            {"MODEL__VIT__WINDOW_BLOCK_INDEXES": [1, 4]},
            r"MODEL\.VIT\.WINDOW_BLOCK_INDEXES names the blocks \[4\]; there are 4",
        ),
        ({"MODEL__VIT__RESIDUAL_BLOCK_INDEXES": [-1]}, r"MODEL\.VIT\.RESIDUAL_BLOCK_INDEXES names"),
        ({"MODEL__VIT__IMG_SIZE": 8}, r"MODEL\.VIT\.IMG_SIZE is 8, less than one patch"),
    ],
)
def test_vit_values_out_of_range_name_their_key(changes, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(config(VIT, **changes))


def test_vit_trains_a_detector_and_pads_to_squares():
    net = model(config(VIT_RCNN))
    sum(losses(net).values()).backward()
    assert net.backbone.net.pos_embed.grad.abs().sum() > 0
    assert net.preprocess_image(batch()).tensor.shape[-2:] == (128, 128)
    assert len(net.eval()(batch())) == 2


@pytest.mark.parametrize("backbone", ["build_vit_sfp_backbone", "build_vit_backbone"])
def test_vit_pads_to_whole_cells_whatever_detectron2_calls_it(backbone, monkeypatch):
    monkeypatch.setattr(SimpleFeaturePyramid, "padding_constraints", property(lambda self: {"square_size": 0}))
    monkeypatch.setattr(SimpleFeaturePyramid, "size_divisibility", 0)
    changes = {"MODEL__VIT__SQUARE_PAD": 0, "MODEL__BACKBONE__NAME": backbone}
    net = build_backbone(config(VIT, **changes))
    images = ImageList.from_tensors(
        [torch.zeros(3, 65, 90)], net.size_divisibility, padding_constraints=net.padding_constraints
    )
    assert images.tensor.shape[-2:] == ((96, 96) if "sfp" in backbone else (80, 96))


def test_an_image_that_the_square_would_cut_is_an_error():
    net = build_network(config(VIT_RCNN), "x.yaml").eval()
    assert len(net(batch([(128, 128)]))) == 1
    with pytest.raises(ImageSizeError, match=r"a side of 129 pixels, and .* squares of 128 \(MODEL.VIT.SQUARE_PAD\)"):
        net(batch([(128, 128), (64, 129)]))


def test_taps_of_vit():
    net = model(config(VIT_RCNN)).eval()
    assert tap_names(net) == ["p2", "p3", "p4", "p5", "p6", "last_feat"]
    names = ["p2", "last_feat", "blocks.3", "backbone.net.blocks.0"]
    with torch.no_grad(), FeatureTaps(net, names).recording() as features:
        net(batch())
    assert features["p2"].shape == (2, 16, 32, 32)
    assert features["backbone.net.blocks.0"].shape == (2, 32, 8, 8)
    # the last block's tokens are the feature map
    assert torch.equal(features["blocks.3"], features["last_feat"])


def test_taps_of_fcos():
    net = model(config(FCOS_R50)).eval()
    names = ["p3", "p7", "res4.pre_relu", "head.ctrness@0"]
    with torch.no_grad(), FeatureTaps(net, names).recording() as features:
        net(batch())
    assert features["p3"].shape == (2, 32, 16, 16) and features["head.ctrness@0"].shape == (2, 1, 16, 16)


@pytest.mark.parametrize(
    "base, narrower, levels",
    [
        (FCOS_R50, {"MODEL__RESNETS__WIDTH_PER_GROUP": 8}, {"p3", "p4", "p5"}),
        (VIT_RCNN, {"MODEL__VIT__EMBED_DIM": 64}, {"p2", "p3", "p4", "p5"}),
    ],
    ids=["FCOS", "ViT"],
)
def test_distillation_with_the_default_recipe(tmp_path, base, narrower, levels):
    teacher = write_teacher(tmp_path, config(base, **narrower))
    net = build_distilled_model(config(base, **teacher))
    found = losses(net)
    assert levels <= {name.split("/")[2] for name in found if name.startswith("distill/FeatureMimic")}
    sum(found.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.student.parameters() if p.grad is not None)


def test_transformer_block_of_a_teacher_is_distilled_as_a_map(tmp_path):
    teacher = write_teacher(tmp_path, config(VIT_RCNN, MODEL__VIT__EMBED_DIM=64))
    keys = {"DISTILL__FEATURE_MIMIC__TAPS": ["blocks.1"], "DISTILL__FEATURE_MIMIC__TEACHER_TAPS": ["blocks.3"]}
    net = build_distilled_model(config(VIT_RCNN, **teacher, **keys))
    (pair,) = net.distillers["FeatureMimic"].pairs
    assert (pair.student.channels, pair.teacher.channels, pair.student.stride) == (32, 64, 16)
    assert torch.isfinite(losses(net)["distill/FeatureMimic/blocks.1"])


def learning_rates(cfg: CfgNode, net: torch.nn.Module) -> dict:
    groups = build_optimizer(cfg, net).param_groups
    of = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    return {name: of[id(p)] for name, p in net.named_parameters() if id(p) in of}


def test_layer_decay_gives_earlier_blocks_smaller_rates_also_under_distillation(tmp_path):
    keys = {"SOLVER__OPTIMIZER": "AdamW", "SOLVER__BASE_LR": 1.0, "SOLVER__LAYER_DECAY": 0.5}
    keys["SOLVER__WEIGHT_DECAY"] = 0.1
    cfg = config(VIT_RCNN, **keys)
    plain = learning_rates(cfg, build_model(cfg))
    assert plain["backbone.net.patch_embed.proj.weight"][0] == 0.5**5
    assert [plain[f"backbone.net.blocks.{i}.mlp.fc1.weight"][0] for i in range(4)] == [0.5**4, 0.5**3, 0.5**2, 0.5]
    assert plain["backbone.simfp_2.0.weight"] == plain["roi_heads.box_head.fc1.weight"] == (1.0, 0.1)
    assert plain["backbone.net.pos_embed"] == (0.5**5, 0.0) and plain["backbone.net.blocks.0.norm1.weight"][1] == 0.0
    keys |= {
        **write_teacher(tmp_path, config(VIT_RCNN, MODEL__FPN__OUT_CHANNELS=8)),
        "DISTILL__METHODS": ["FeatureMimic"],
    }
    for factor in (1.0, 0.1):
        cfg = config(VIT_RCNN, **keys, DISTILL__INIT_FROM_TEACHER__LR_FACTOR=factor)
        distilled = learning_rates(cfg, build_distilled_model(cfg))
        assert all(v[0] == 1.0 for k, v in distilled.items() if k.startswith("distillers."))
        ours = {k.removeprefix("student."): v for k, v in distilled.items() if k.startswith("student.")}
        assert ours["roi_heads.box_predictor.cls_score.weight"] == (factor, 0.1)
        slow = {name for name in ours if ours[name] != plain[name]}
        assert not any(name.startswith("backbone.net.") for name in slow) and bool(slow) == (factor != 1.0)


@pytest.mark.parametrize(
    "base, changes, message",
    [
        (VIT_RCNN, {}, r"SOLVER\.LAYER_DECAY is .* it needs SOLVER\.OPTIMIZER AdamW"),
        (
            FASTER_RCNN,
            {"SOLVER__OPTIMIZER": "AdamW"},
            r"SOLVER\.LAYER_DECAY is set, but the backbone is neither a vision transformer",
        ),
        (VIT_RCNN, {"SOLVER__OPTIMIZER": "AdamW", "SOLVER__LAYER_DECAY": 1.5}, r"SOLVER\.LAYER_DECAY is 1\.5"),
    ],
)
def test_layer_decay_that_cannot_work_is_an_error(base, changes, message):
    cfg = config(base, **{"SOLVER__LAYER_DECAY": 0.7, **changes})
    with pytest.raises(ValueError, match=message):
        build_optimizer(cfg, build_model(cfg))
