"""Checkpoints of torchvision and timm: the same features in a Detectron2 model, names, refusals and advice."""

import pytest
import torch
import torchvision
from models import FASTER_RCNN, RETINANET, config, model
from torch import nn

from d2kd.modeling.pretrained_names import (
    RESNET,
    TIMM_VIT,
    TORCHVISION_VIT,
    input_advice,
    misfit,
    source_of,
    to_detectron2,
)
from detectron2.modeling import build_backbone

BOTTOM_UP = "backbone.bottom_up."
FULL_WIDTH = {"MODEL__RESNETS__STEM_OUT_CHANNELS": 64, "MODEL__RESNETS__NORM": "FrozenBN"}
BOTTLENECKS = {"MODEL__RESNETS__RES2_OUT_CHANNELS": 256, "MODEL__RESNETS__WIDTH_PER_GROUP": 64}
#: Keys under which a model has torchvision's sizes.
RESNETS = {
    "resnet18": {"MODEL__RESNETS__DEPTH": 18, "MODEL__RESNETS__RES2_OUT_CHANNELS": 64},
    "resnet34": {"MODEL__RESNETS__DEPTH": 34, "MODEL__RESNETS__RES2_OUT_CHANNELS": 64},
    "resnet50": BOTTLENECKS,
    "resnext50_32x4d": {**BOTTLENECKS, "MODEL__RESNETS__NUM_GROUPS": 32, "MODEL__RESNETS__WIDTH_PER_GROUP": 4},
    "wide_resnet50_2": {**BOTTLENECKS, "MODEL__RESNETS__WIDTH_PER_GROUP": 128},
}
ALL_STAGES = {**RETINANET, "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"]}
#: A transformer of torchvision, and the same without windows and relative positions in Detectron2.
SMALL_VIT = {"image_size": 64, "patch_size": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
VIT_RCNN = {
    **FASTER_RCNN,
    "MODEL.BACKBONE.NAME": "build_vit_sfp_backbone",
    "MODEL.FPN.NORM": "LN",
    "MODEL.VIT.IMG_SIZE": 64,
    "MODEL.VIT.PRETRAIN_IMG_SIZE": 64,
    "MODEL.VIT.EMBED_DIM": 32,
    "MODEL.VIT.DEPTH": 2,
    "MODEL.VIT.NUM_HEADS": 2,
    "MODEL.VIT.MLP_RATIO": 2.0,
    "MODEL.VIT.USE_REL_POS": False,
    "MODEL.VIT.WINDOW_BLOCK_INDEXES": [],
}


@torch.no_grad()
def randomized(net: nn.Module) -> nn.Module:
    """A network in evaluation mode whose vectors too are random: biases, affine parameters and batch statistics."""
    generator = torch.Generator().manual_seed(0)
    for name, value in net.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2.0, generator=generator)
        elif value.dim() == 1 and name.endswith("weight"):
            value.uniform_(0.2, 0.7, generator=generator)
        elif value.dim() == 1:
            value.normal_(0, 0.1, generator=generator)
    return net.eval()


def torchvision_resnet(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomized(getattr(torchvision.models, name)(weights=None))


def torchvision_vit() -> nn.Module:
    torch.manual_seed(0)
    return randomized(torchvision.models.VisionTransformer(**SMALL_VIT))


def load(net: nn.Module, weights: dict, bottom_up: str) -> list[str]:
    """Loads a checkpoint, which must fill the whole bottom-up network; returns the names without a place."""
    placed, left_over = to_detectron2(weights, net.state_dict())
    assert set(placed) == {name for name in net.state_dict() if name.startswith(bottom_up)}
    net.load_state_dict(placed, strict=False)
    return left_over


def resnet_names(**changes) -> list[str]:
    return list(model(config(**changes)).state_dict())


def timm_vit(blocks: int = 2, dim: int = 32) -> dict[str, torch.Tensor]:
    """timm's names, for 4 x 4 patches; each tensor has numbers of its own."""
    linears = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
    linears |= {"mlp.fc1": (2 * dim, dim), "mlp.fc2": (dim, 2 * dim)}
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 17, dim), "patch_embed.proj.weight": (dim, 3, 16, 16)}
    shapes["patch_embed.proj.bias"] = (dim,)
    for i in range(blocks):
        for name, shape in {"norm1": (dim,), **linears, "norm2": (dim,)}.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,), "head.weight": (10, dim), "head.bias": (10,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


# ---- ResNets ----


@pytest.mark.parametrize("name", RESNETS)
@torch.no_grad()
def test_resnets_compute_the_same_features(name):
    theirs = torchvision_resnet(name)
    ours = model(config(ALL_STAGES, **FULL_WIDTH, **RESNETS[name])).eval()
    assert source_of(theirs.state_dict()) == RESNET
    assert load(ours, theirs.state_dict(), BOTTOM_UP) == ["fc.weight", "fc.bias"]

    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    features = ours.backbone.bottom_up(images)
    x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
    for stage in (1, 2, 3, 4):
        x = getattr(theirs, f"layer{stage}")(x)
        assert 0.1 < x.std() < 10
        torch.testing.assert_close(features[f"res{stage + 1}"], x, atol=1e-4, rtol=0)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_batch_counters_go_where_the_model_counts(norm):
    names = resnet_names(MODEL__RESNETS__NORM=norm)
    placed, left_over = to_detectron2(torchvision_resnet("resnet50").state_dict(), names)
    assert ("backbone.bottom_up.stem.conv1.norm.num_batches_tracked" in placed) == (norm == "BN")
    assert left_over == ["fc.weight", "fc.bias"]


def test_names_of_the_blocks():
    placed, _ = to_detectron2(torchvision_resnet("resnet50").state_dict(), resnet_names())
    assert {
        f"{BOTTOM_UP}{name}"
        for name in ("stem.conv1.norm.bias", "res2.0.shortcut.weight", "res3.0.shortcut.norm.running_var")
    } <= set(placed)


@pytest.mark.parametrize("container", [None, "model", "state_dict", "model_state_dict", "teacher"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "encoder.", "model.", "module.model.backbone."])
@pytest.mark.parametrize("source", [RESNET, TIMM_VIT, TORCHVISION_VIT])
def test_containers_and_prefixes(source, prefix, container):
    if source == RESNET:
        names, plain = resnet_names(), torchvision_resnet("resnet18").state_dict()
    else:
        names = list(model(config(VIT_RCNN)).state_dict())
        plain = timm_vit() if source == TIMM_VIT else torchvision_vit().state_dict()
    weights = {f"{prefix}{name}": tensor for name, tensor in plain.items()} | {"projector.weight": torch.zeros(1)}
    file = {container: weights, "epoch": 3, "optimizer": {"state": {}}} if container else weights
    assert source_of(file) == source
    placed, left_over = to_detectron2(file, names)
    expected, rest = to_detectron2(plain, names)
    assert len(expected) > 20 and list(placed) == list(expected)
    assert all(placed[name] is expected[name] for name in expected)
    assert left_over == [*(f"{prefix}{name}" for name in rest), "projector.weight"]


def test_containers_in_containers():
    assert source_of({"model": {"state_dict": torchvision_resnet("resnet18").state_dict()}}) == RESNET
    assert source_of({"model": "resnet18", "state_dict": torchvision_resnet("resnet18").state_dict()}) == RESNET


def test_stages_that_the_model_leaves_out_have_no_place():
    shallow = {"MODEL.BACKBONE.NAME": "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES": ["res4"]}
    names = list(build_backbone(config({**RETINANET, **shallow})).state_dict())
    placed, left_over = to_detectron2(torchvision_resnet("resnet50").state_dict(), names)
    assert set(placed) == set(names) and "res4.5.conv3.weight" in placed
    assert all(name.startswith(("layer4.", "fc.")) for name in left_over) and "layer4.2.conv3.weight" in left_over


def test_c4_models_have_the_last_stage_in_their_heads():
    c4 = {
        "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
        "MODEL.BACKBONE.NAME": "build_resnet_backbone",
        "MODEL.ROI_HEADS.NAME": "Res5ROIHeads",
    }
    names = resnet_names(base=c4)
    placed, left_over = to_detectron2(torchvision_resnet("resnet50").state_dict(), names)
    assert set(placed) == {name for name in names if name.startswith(("backbone.", "roi_heads.res5."))}
    assert left_over == ["fc.weight", "fc.bias"]


def test_a_bare_network_and_its_classifier():
    weights = torchvision_resnet("resnet18").state_dict()
    placed, left_over = to_detectron2(
        weights, ["stem.conv1.weight", "res2.0.conv1.weight", "linear.weight", "linear.bias"]
    )
    assert placed["linear.weight"] is weights["fc.weight"] and placed["stem.conv1.weight"] is weights["conv1.weight"]
    assert not {"fc.weight", "fc.bias", "conv1.weight"} & set(left_over)


def test_other_shapes_are_left_to_the_loader():
    names = resnet_names()
    weights = torchvision_resnet("resnet50").state_dict()
    placed, _ = to_detectron2(weights, names)
    assert placed[f"{BOTTOM_UP}stem.conv1.weight"].shape[0] == 64  # the model has 8


# ---- vision transformers ----


@torch.no_grad()
def test_torchvision_vit_computes_the_same_tokens():
    theirs = torchvision_vit()
    ours = model(config(VIT_RCNN)).eval()
    assert source_of(theirs.state_dict()) == TORCHVISION_VIT
    left_over = load(ours, theirs.state_dict(), "backbone.net.")
    assert left_over == ["class_token", "encoder.ln.weight", "encoder.ln.bias", "heads.head.weight", "heads.head.bias"]

    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    # without the class token, which Detectron2's ViT does not have
    tokens = theirs._process_input(images) + theirs.encoder.pos_embedding[:, 1:]
    net = ours.backbone.net
    grid = net.patch_embed(images) + net.pos_embed[:, 1:].view(1, 4, 4, 32)
    torch.testing.assert_close(grid.flatten(1, 2), tokens, atol=1e-4, rtol=0)
    torch.testing.assert_close(net.blocks[0](grid).flatten(1, 2), theirs.encoder.layers[0](tokens), atol=1e-4, rtol=0)
    after = theirs.encoder.layers(tokens)
    torch.testing.assert_close(net(images)["last_feat"].flatten(2).mT, after, atol=1e-4, rtol=0)
    assert (after - tokens).std() > 0.1


def test_timm_vit_has_detectron2s_names():
    weights = timm_vit()
    net = model(config(VIT_RCNN))
    assert source_of(weights) == TIMM_VIT
    assert load(net, weights, "backbone.net.") == ["cls_token", *list(weights)[-4:]]
    for name in ("pos_embed", "patch_embed.proj.bias", "blocks.1.attn.qkv.weight", "blocks.0.mlp.fc2.bias"):
        assert torch.equal(net.state_dict()[f"backbone.net.{name}"], weights[name])


def test_older_torchvision_files():
    new = torchvision_vit().state_dict()
    old = {n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): t for n, t in new.items()}
    assert list(old) != list(new) and source_of(old) == TORCHVISION_VIT
    names = model(config(VIT_RCNN)).state_dict()
    assert list(to_detectron2(old, names)[0]) == list(to_detectron2(new, names)[0])


def test_a_vit_without_a_pyramid_and_a_longer_table_of_positions():
    weights = timm_vit() | {"pos_embed": torch.zeros(1, 50, 32)}
    names = [f"backbone.{n}" for n in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "pos_embed")]
    placed, left_over = to_detectron2(weights, names)
    assert set(placed) == set(names)
    assert placed["backbone.pos_embed"].shape == (1, 50, 32) and len(left_over) == len(weights) - 3


# ---- what is not recognized ----


@pytest.mark.parametrize(
    "renamed, added",
    [
        ({"conv1.": "conv1.0."}, {"conv1.1.weight": 1, "conv1.3.weight": 4}),  # timm's resnet50d, resnet50s
        ({}, {"conv2.weight": 4}),  # HRNet
        ({}, {"conv2.weight": 4, "conv3.weight": 4, "attnpool.positional_embedding": 2}),  # CLIP
        ({}, {"layer1.0.downsample.2.weight": 1}),  # resnet50d's shortcut: pool, convolution, norm
        ({}, {"layer1.0.se.fc1.weight": 4}),  # squeeze-and-excitation
        ({}, {"layer1.0.conv1.bias": 1}),
    ],
)
def test_relatives_of_resnets_are_not_recognized(renamed, added):
    weights = dict(torchvision_resnet("resnet50").state_dict())
    for old, new in renamed.items():
        weights = {new + n.removeprefix(old) if n.startswith(old) else n: t for n, t in weights.items()}
    weights |= {name: torch.zeros([1] * dims) for name, dims in added.items()}
    assert source_of(weights) is None
    assert to_detectron2(weights, resnet_names()) == ({}, list(weights))


@pytest.mark.parametrize(
    "added", ["blocks.0.ls1.gamma", "blocks.1.attn.q_norm.weight", "norm_pre.weight", "blocks.0.attn.rel_pos_h"]
)
def test_relatives_of_vits_are_not_recognized(added):
    assert source_of(timm_vit() | {added: torch.zeros(1)}) is None


@pytest.mark.parametrize("name", ["vgg11_bn", "swin_t", "mobilenet_v3_small", "densenet121", "convnext_tiny"])
def test_other_networks_are_not_recognized(name):
    with torch.device("meta"):
        weights = getattr(torchvision.models, name)(weights=None).state_dict()
    assert source_of(weights) is None


def test_detectron2s_own_files_are_not_recognized():
    for net in (model(), model(config(VIT_RCNN))):
        weights = net.state_dict()
        assert source_of(weights) is None and source_of({"model": weights}) is None
        bare = {name.removeprefix(BOTTOM_UP): tensor for name, tensor in weights.items()}
        assert source_of(bare) is None
    assert source_of({}) is None


def test_a_network_of_another_kind_than_the_models_has_no_place():
    resnet, vit = torchvision_resnet("resnet18").state_dict(), torchvision_vit().state_dict()
    assert to_detectron2(resnet, model(config(VIT_RCNN)).state_dict()) == ({}, list(resnet))
    assert to_detectron2(vit, resnet_names()) == ({}, list(vit))
    swin = ["backbone.bottom_up.patch_embed.proj.weight", "backbone.bottom_up.layers.0.blocks.0.attn.qkv.weight"]
    assert to_detectron2(vit, swin) == ({}, list(vit))


# ---- advice ----

RGB = {
    "INPUT__FORMAT": "RGB",
    "MODEL__PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL__PIXEL_STD": [58.395, 57.12, 57.375],
}


@pytest.mark.parametrize("source", [RESNET, TIMM_VIT, TORCHVISION_VIT])
def test_no_advice_where_all_is_right(source):
    assert input_advice(source, config(**RGB)) is None
    rounded = {**RGB, "MODEL__PIXEL_MEAN": [123.7, 116.3, 103.5], "MODEL__PIXEL_STD": [58.4, 57.1, 57.4]}
    assert input_advice(source, config(**rounded)) is None


def test_advice_names_every_key_that_differs():
    bgr = {"MODEL__PIXEL_MEAN": [103.53, 116.28, 123.675], "MODEL__PIXEL_STD": [1.0, 1.0, 1.0]}
    assert input_advice(RESNET, config(**bgr, MODEL__RESNETS__STRIDE_IN_1X1=True)) == (
        "Weights of a torchvision or timm ResNet need what they were trained with: "
        "set INPUT.FORMAT to RGB (it is BGR), "
        "MODEL.PIXEL_MEAN to [123.675, 116.28, 103.53] (it is [103.53, 116.28, 123.675]), "
        "MODEL.PIXEL_STD to [58.395, 57.12, 57.375] (it is [1.0, 1.0, 1.0]), "
        "MODEL.RESNETS.STRIDE_IN_1X1 to False (it is True)."
    )


def test_advice_on_the_stride_is_for_bottlenecks():
    stride = {**RGB, "MODEL__RESNETS__STRIDE_IN_1X1": True}
    advice = input_advice(RESNET, config(**stride))
    assert advice is not None and "STRIDE_IN_1X1 to False" in advice and "PIXEL" not in advice
    assert input_advice(RESNET, config(**stride, MODEL__RESNETS__DEPTH=18)) is None


@pytest.mark.parametrize("source", [TIMM_VIT, TORCHVISION_VIT])
def test_advice_for_transformers_is_about_the_channel_order_alone(source):
    assert input_advice(source, config(**{**RGB, "MODEL__PIXEL_STD": [127.5] * 3})) is None
    assert input_advice(source, config()) == (
        f"Weights of a {source} need what they were trained with: set INPUT.FORMAT to RGB (it is BGR)."
    )


# ---- weights of another network ----


@pytest.mark.parametrize(
    "network, changes, words",
    [
        ("resnet50", {}, None),
        ("resnet50", {"MODEL__RESNETS__DEFORM_ON_PER_STAGE": [False, True, True, True]}, None),  # offsets of its own
        ("resnet50", {"MODEL__RESNETS__NORM": "GN"}, None),
        (
            "resnet50",
            {"MODEL__RESNETS__NORM": ""},
            "the file has stem.conv1.norm.weight, and the model nothing like it",
        ),
        ("resnet101", {}, "the file has res4.6.conv1.weight, and the model nothing like it"),
        ("resnet101", {"MODEL__RESNETS__OUT_FEATURES": ["res3"], "MODEL__FPN__IN_FEATURES": ["res3"]}, None),
        (
            "resnet50",
            {"MODEL__RESNETS__DEPTH": 101},
            "the model has res4.6.conv1.weight, and the file nothing like it",
        ),
        (
            "wide_resnet50_2",
            {},
            "res2.0.conv1.weight is (64, 64, 1, 1) in the model, and (128, 64, 1, 1) in the file",
        ),
    ],
)
def test_weights_of_another_depth_or_width_are_told(network, changes, words):
    cfg = config(**{**FULL_WIDTH, **BOTTLENECKS, "MODEL__DEVICE": "meta", **changes})
    if "MODEL__FPN__IN_FEATURES" in changes:
        cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    with torch.device("meta"):
        ours = build_backbone(cfg).state_dict()
        theirs = getattr(torchvision.models, network)(weights=None).state_dict()
    assert misfit(RESNET, theirs, ours) == words


def test_transformers_of_another_size_are_told():
    ours = model(config(VIT_RCNN)).state_dict()
    longer = timm_vit() | {"pos_embed": torch.zeros(1, 50, 32)}  # which is told elsewhere
    assert misfit(TIMM_VIT, longer, ours) is None
    assert (
        misfit(TIMM_VIT, timm_vit(blocks=3), ours)
        == "the file has blocks.2.norm1.weight, and the model nothing like it"
    )
    assert misfit(TIMM_VIT, timm_vit(dim=64), ours).endswith("in the file")
