"""Networks of timm and torchvision as backbones and whole classifiers: what they give, train and load."""

import pytest
import timm
import torch
import torchvision
from helpers import same_tensors
from safetensors.torch import save_file
from torch import nn

from d2kd.config import add_distill_config
from d2kd.engine import load_config
from d2kd.engine.optimizer import build_optimizer
from d2kd.errors import ConfigError
from d2kd.modeling import FeatureTaps, build_network
from d2kd.modeling.backbone import TimmBackbone, TimmNetwork, load_pretrained_network
from d2kd.modeling.taps import TapError, describe_taps
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

BASES = {
    "RetinaNet": ("Base-RetinaNet", "build_retinanet_timm_fpn_backbone"),
    "FCOS": ("Base-FCOS", "build_fcos_timm_fpn_backbone"),
    "R-CNN": ("Base-RCNN-FPN", "build_timm_fpn_backbone"),
}
#: One of every family that the documentation names, as small as there is.
NETWORKS = [
    "mobilenetv2_050", "mobilenetv3_small_050", "mobilenetv4_conv_small_050", "efficientnet_b0", "convnext_atto",
    "swin_s3_tiny_224", "resnet10t", "regnetx_002", "hgnetv2_b0", "vit_tiny_patch16_224",
]  # fmt: skip


def classifier_config(network="resnet10t", library="timm", *options):
    return load_config(
        "",
        [
            *("MODEL.META_ARCHITECTURE", "ImageClassifier", "MODEL.DEVICE", "cpu", "MODEL.BACKBONE.FREEZE_AT", 0),
            *("MODEL.CLASSIFIER.NUM_CLASSES", 7, f"MODEL.{library.upper()}.NAME", network),
            *("MODEL.BACKBONE.NAME", f"build_{library}_network"),
            *options,
        ],
    )


def classifier(*arguments):
    return build_network(classifier_config(*arguments), "--config-file")


def detector_config(network, base="RetinaNet", *options):
    yaml, backbone = BASES[base]
    outputs = ["res2", "res3", "res4", "res5"] if base == "R-CNN" else ["res3", "res4", "res5"]
    features = ["last_feat"] if network.startswith("vit") else outputs
    return load_config(
        f"configs/{yaml}.yaml",
        [
            *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.NAME", backbone, "MODEL.TIMM.NAME", network),
            *("MODEL.TIMM.OUT_FEATURES", features, "MODEL.FPN.OUT_CHANNELS", 32, "MODEL.BACKBONE.FREEZE_AT", 0),
            *options,
        ],
    )


def images(count=2, side=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"image": torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=generator), "label": i}
        for i in range(count)
    ]


def scenes():
    """Two images of odd sizes with an object each."""
    found = []
    for h, w in ((75, 90), (64, 83)):
        truth = Instances((h, w))
        truth.gt_boxes, truth.gt_classes = Boxes(torch.tensor([[8.0, 8.0, 50.0, 60.0]])), torch.tensor([1])
        found.append(
            {"image": torch.full((3, h, w), 9, dtype=torch.uint8), "instances": truth, "height": h, "width": w}
        )
    return found


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("network", NETWORKS)
def test_every_family_is_a_backbone_of_every_detector(network, base):
    model = build_network(detector_config(network, base), "--config-file")
    with EventStorage():
        losses = model(scenes())
        sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    # data-parallel training fails on parameters that take no part
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    assert len(model.eval()(scenes())) == 2
    features = model.backbone(torch.zeros(1, 3, 128, 256))
    for name, shape in model.backbone.output_shape().items():
        assert features[name].shape[1:] == (shape.channels, 128 // shape.stride, 256 // shape.stride)


@pytest.mark.parametrize("network", NETWORKS[:6])
def test_a_backbone_gives_what_timm_gives(network):
    backbone = TimmBackbone(network, ["res3", "res5"]).eval()
    whole = timm.create_model(network, features_only=True).eval()
    whole.load_state_dict(backbone.net.state_dict(), strict=False)
    x = torch.randn(1, 3, 224, 224)
    expected = [m.permute(0, 3, 1, 2) if "swin" in network else m for m in whole(x)]
    ours = backbone(x)
    assert list(ours) == ["res3", "res5"]
    assert torch.equal(ours["res3"], expected[-3]) and torch.equal(ours["res5"], expected[-1])
    assert [s.stride for s in backbone.output_shape().values()] == [8, 32]


def test_a_transformer_of_one_stride_runs_all_its_blocks():
    backbone = TimmBackbone("vit_tiny_patch16_224", ["last_feat"]).eval()
    whole = timm.create_model("vit_tiny_patch16_224").eval()
    ours, theirs = backbone.net.model, dict(whole.named_parameters())
    assert len(ours.blocks) == len(whole.blocks) == 12
    whole.load_state_dict(ours.state_dict(), strict=False)
    x = torch.randn(1, 3, 224, 224)
    expected = whole.forward_intermediates(x, indices=1, norm=False, intermediates_only=True)[0]
    assert torch.equal(backbone(x)["last_feat"], expected) and theirs.keys() >= dict(ours.named_parameters()).keys()


def test_features_are_named_by_stride_and_dilation_shows():
    plain = TimmBackbone("resnet10t", ["res5", "res1"]).output_shape()
    assert {name: shape.stride for name, shape in plain.items()} == {"res1": 2, "res5": 32}
    dilated = TimmBackbone("resnet10t", ["res4", "res5"], arguments={"output_stride": 16})
    assert [shape.stride for shape in dilated.output_shape().values()] == [16, 16]
    moved = TimmBackbone("mobilenetv2_050", ["res3", "res4"], strides=["blocks.3.0.conv_dw", 1])
    assert [shape.stride for shape in moved.output_shape().values()] == [8, 8]
    features = moved(torch.zeros(1, 3, 64, 64))
    assert [f.shape[-1] for f in features.values()] == [8, 8]


@pytest.mark.parametrize("network", ["mobilenetv1_100", "deit_tiny_patch16_224", "resnet10t"])
def test_a_whole_network_scores_as_timm_does_on_its_own_pixels(network):
    model = classifier(network).eval()
    data = timm.data.resolve_data_config(model=model.backbone.net)
    batch = images(side=224)
    pixels = torch.stack([x["image"] for x in batch]).float() / 255
    mean, std = (torch.tensor(data[k]).view(3, 1, 1) for k in ("mean", "std"))
    expected = model.backbone.net((pixels - mean) / std).softmax(1)
    scores = torch.stack([x["scores"] for x in model(batch)])
    assert torch.allclose(scores, expected, atol=1e-5) and torch.allclose(scores.sum(1), torch.ones(2))


#: The classifiers of the papers, with the classes that they have by default and their parameters in millions.
NAMED = {
    "timm": {
        "resnet18": 11.7, "resnet34": 21.8, "resnet50": 25.6, "resnet152": 60.2, "mobilenetv1_100": 4.2,
        "mobilenetv2_100": 3.5, "deit_tiny_patch16_224": 5.7, "deit_small_patch16_224": 22.1,
        "deit_base_patch16_224": 86.6, "deit3_small_patch16_224": 22.1, "deit3_base_patch16_224": 86.6,
        "deit3_large_patch16_224": 304.4, "deit3_huge_patch14_224": 632.1, "cait_s24_224": 46.9,
    },
    "torchvision": {
        "resnet18": 11.7, "resnet34": 21.8, "resnet50": 25.6, "resnet152": 60.2, "mobilenet_v2": 3.5,
        "shufflenet_v2_x1_0": 2.3,
    },
}  # fmt: skip


@pytest.mark.parametrize("library", NAMED)
def test_the_networks_of_the_papers_are_there_by_name(library):
    for name, millions in NAMED[library].items():
        with torch.device("meta"):  # the largest has 2.5 GB of weights
            if library == "timm":
                network = TimmNetwork(name, 1000)
                logits = network(torch.zeros(2, 3, 224, 224))["class_logits"]
            else:
                network = torchvision.models.get_model(name)
                logits = network(torch.zeros(2, 3, 224, 224))
        assert logits.shape == (2, 1000)
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.06), name


def test_pixels_are_those_of_the_network_unless_the_configuration_is_to_decide():
    cfg = classifier_config("mobilenetv1_100")
    assert (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT) == ([127.5] * 3, [127.5] * 3, "RGB")
    cfg = classifier_config("shufflenet_v2_x0_5", "torchvision")
    assert (cfg.MODEL.PIXEL_MEAN, cfg.INPUT.FORMAT) == ([123.675, 116.28, 103.53], "RGB")
    cfg = classifier_config("mobilenetv1_100", "timm", "MODEL.TIMM.DATA_CONFIG", False)
    assert (cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT) == ([1.0, 1.0, 1.0], "BGR")


@pytest.mark.filterwarnings("ignore:Mapping deprecated model name")
def test_old_names_and_folders_of_a_hub_have_their_own_pixels_and_classes(tmp_path):
    assert classifier_config("vit_tiny_patch16_224_in21k").MODEL.PIXEL_MEAN == [127.5] * 3
    source = timm.create_model("resnet10t", num_classes=3)
    source.pretrained_cfg.update(mean=(0.2, 0.4, 0.6))
    timm.models.save_for_hf(source, str(tmp_path), safe_serialization=True)
    cfg = classifier_config(f"local-dir:{tmp_path}", "timm", "MODEL.TIMM.WEIGHTS", "download")
    assert cfg.MODEL.PIXEL_MEAN == [51.0, 102.0, 153.0]
    filled = load_pretrained_network(cfg, model := build_network(cfg, "--config-file"))
    # a head for other classes must not pass for a pretrained one
    assert model.state_dict().keys() - filled == {"backbone.net.fc.weight", "backbone.net.fc.bias"}
    assert torch.equal(model.backbone.net.conv1[0].weight, source.conv1[0].weight)


def test_a_stage_that_no_module_ends_is_no_stage():
    assert list(classifier("tresnet_m").backbone.stages) == ["res2", "res3", "res4", "res5"]


def test_rates_fall_in_a_network_whose_wrapper_renames_all_modules():
    options = ("SOLVER.OPTIMIZER", "AdamW", "SOLVER.LAYER_DECAY", 0.5, "SOLVER.BASE_LR", 1.0)
    model = build_network(cfg := detector_config("densenet121", "RetinaNet", *options), "--config-file")
    rates = [group["lr"] for group in build_optimizer(cfg, model).param_groups]
    assert min(rates) < 0.5**50 and max(rates) == 1.0


def test_networks_of_one_size_are_built_frozen_and_tapped_at_that_size():
    model = classifier("levit_128s", "timm", "MODEL.BACKBONE.FREEZE_AT", 1)
    assert model.backbone.fixed_side == 224 and describe_taps(model, ["logits"])["logits"].channels == 7
    assert classifier("resnet10t").backbone.fixed_side is None


def test_auxiliary_heads_that_no_loss_trains_are_left_out():
    names = [name for name, _ in classifier("googlenet", "torchvision").named_parameters()]
    assert names and not [name for name in names if "aux" in name]


def test_pixels_that_do_not_suit_are_told(caplog):
    caplog.set_level("INFO")
    classifier("resnet10t")
    assert "Pixels of resnet10t: RGB, mean [123.675, 116.28, 103.53]" in caplog.text and not [
        r for r in caplog.records if r.levelname == "WARNING"
    ]
    cfg = get_cfg()  # a program that does not read its configuration by d2kd
    add_distill_config(cfg)
    cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE = "cpu", "ImageClassifier"
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.TIMM.NAME = "build_timm_network", "resnet10t"
    build_model(cfg)
    assert "pretrained weights expect RGB" in caplog.text


@pytest.mark.parametrize(
    "freeze_at, frozen", [(0, ()), (1, ("conv1", "bn1")), (3, ("conv1", "bn1", "layer1", "layer2"))]
)
def test_freezing_stops_at_the_stage_and_holds_its_statistics(freeze_at, frozen):
    backbone = TimmBackbone("resnet18", ["res2", "res5"], freeze_at=freeze_at).train()
    names = [name for name, parameter in backbone.net.named_parameters() if not parameter.requires_grad]
    assert {name.split(".")[0] for name in names} == set(frozen) - {"bn1"}
    # frozen batch norms have no parameters, and no statistics that move
    before = {k: v.clone() for k, v in backbone.net.state_dict().items() if "running_mean" in k}
    backbone(torch.randn(2, 3, 64, 64))
    moved = {
        k.split(".")[0] for k, v in backbone.net.state_dict().items() if k in before and not torch.equal(v, before[k])
    }
    assert moved == {"bn1", "layer1", "layer2", "layer3", "layer4"} - set(frozen)


def test_a_network_without_a_stem_of_its_own_freezes_what_comes_before_its_first_stage():
    backbone = TimmBackbone("convnext_atto", ["res2", "res5"], freeze_at=1)
    frozen = {name.split(".")[0] for name, p in backbone.net.named_parameters() if not p.requires_grad}
    assert frozen == {"stem_0", "stem_1"}


def test_norms_are_trained_frozen_or_shared():
    frozen = TimmBackbone("mobilenetv3_small_050", ["res5"], norm="FrozenBN").train()
    before = {k: v.clone() for k, v in frozen.state_dict().items()}
    frozen(torch.randn(2, 3, 64, 64))["res5"].sum().backward()
    assert same_tensors(frozen.state_dict(), before)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in frozen.modules())
    shared = TimmBackbone("mobilenetv3_small_050", ["res5"], norm="SyncBN")
    assert any(isinstance(m, nn.SyncBatchNorm) for m in shared.modules())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_of_timm_are_loaded_into_backbone_and_classifier(tmp_path, suffix, wrapped):
    torch.manual_seed(3)
    source = timm.create_model("convnext_atto").state_dict()
    path = str(tmp_path / f"weights{suffix}")
    if suffix == ".safetensors":
        save_file(source, path)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in source.items()}} if wrapped else source, path)
    cfg = detector_config("convnext_atto", "RetinaNet", "MODEL.TIMM.WEIGHTS", path)
    model = build_network(cfg, "--config-file")
    filled = load_pretrained_network(cfg, model)
    net = model.backbone.bottom_up.net
    assert torch.equal(net.stages_3.blocks[1].conv_dw.weight, source["stages.3.blocks.1.conv_dw.weight"])
    assert filled == {f"backbone.bottom_up.net.{name}" for name in net.state_dict()}
    cfg = classifier_config("convnext_atto", "timm", "MODEL.TIMM.WEIGHTS", path, "MODEL.CLASSIFIER.NUM_CLASSES", 1000)
    model = build_network(cfg, "--config-file")
    load_pretrained_network(cfg, model)
    assert same_tensors(dict(model.backbone.net.state_dict()), source)


@pytest.mark.parametrize("library, network", [("timm", "resnet10t"), ("torchvision", "shufflenet_v2_x0_5")])
def test_a_classifier_for_other_classes_is_initialized_anew_and_told(tmp_path, caplog, library, network):
    torch.manual_seed(3)
    create = timm.create_model if library == "timm" else torchvision.models.get_model
    source = create(network, num_classes=12)
    path = str(tmp_path / "twelve.pth")
    torch.save(source.state_dict(), path)
    cfg = classifier_config(network, library, f"MODEL.{library.upper()}.WEIGHTS", path)
    model = build_network(cfg, "--config-file")
    before = model.backbone.net.fc.weight.clone()
    filled = load_pretrained_network(cfg, model)
    assert torch.equal(model.backbone.net.fc.weight, before)
    assert torch.equal(next(model.backbone.net.parameters()), next(source.parameters()))
    assert "Initialized anew, as the weights are for other classes: fc.weight, fc.bias" in caplog.text
    assert "backbone.net.fc.weight" not in filled


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_weights_that_cannot_be_used_are_one_line(tmp_path, library):
    other = tmp_path / "other.pth"
    torch.save(timm.create_model("mobilenetv3_small_050").state_dict(), other)
    broken = tmp_path / "broken.pth"
    broken.write_bytes(other.read_bytes()[:5000])
    empty = tmp_path / "empty.pth"
    torch.save({"epoch": 3}, empty)
    network = "resnet10t" if library == "timm" else "resnet18"
    for path in (tmp_path / "absent.pth", other, broken, empty):
        cfg = classifier_config(network, library, f"MODEL.{library.upper()}.WEIGHTS", str(path))
        model = build_network(cfg, "--config-file")
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(ConfigError, match=rf"MODEL\.{library.upper()}\.WEIGHTS is .*{path.name}") as error:
            load_pretrained_network(cfg, model)
        assert "\n" not in str(error.value)
        assert same_tensors(model.state_dict(), before)


def test_rates_fall_from_layer_to_layer():
    options = ("SOLVER.OPTIMIZER", "AdamW", "SOLVER.LAYER_DECAY", 0.5, "SOLVER.BASE_LR", 1.0)
    model = build_network(cfg := detector_config("convnext_atto", "RetinaNet", *options), "--config-file")
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build_optimizer(cfg, model)
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates["head.cls_score.weight"] == rates["backbone.fpn_lateral5.weight"] == 1.0
    body = [rates[f"backbone.bottom_up.net.stages_{i}.blocks.0.conv_dw.weight"] for i in range(4)]
    assert body == sorted(body) and len(set(body)) == 4 and body[-1] < 1.0
    assert rates["backbone.bottom_up.net.stages_3.blocks.1.conv_dw.weight"] == 0.5  # the last layer
    assert rates["backbone.bottom_up.net.stem_0.weight"] == min(rates.values())
    model = build_network(cfg := classifier_config("resnet10t", "timm", *options), "--config-file")
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in build_optimizer(cfg, model).param_groups for p in g["params"]}
    assert rates["backbone.net.fc.weight"] == max(rates.values()) > rates["backbone.net.layer1.0.conv1.weight"]


# ---- taps ----


def recorded(model, names, side=64):
    with FeatureTaps(model, names).recording() as features:
        model.eval()(images(1, side))
    return features


def output_of(model, path, side=64):
    """What a module gives; a copy, as it may be changed in place later."""
    kept = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, a, out: kept.append(out.clone()))
    with handle:
        model.eval()(images(1, side))
    return kept[-1]


@pytest.mark.parametrize("act", ["relu", "relu6"])
def test_blocks_of_mobilenet_v1_are_tapped_before_their_activation(act):
    model = classifier("mobilenetv1_100", "timm", "MODEL.TIMM.ARGS", ["act_layer", act])
    names = [f"res{i}{suffix}" for i in (2, 3, 4, 5) for suffix in ("", ".pre_relu")]
    features = recorded(model, names)
    clamp = torch.relu if act == "relu" else nn.functional.relu6
    for i, channels in zip((2, 3, 4, 5), (128, 256, 512, 1024)):
        before = features[f"res{i}.pre_relu"]
        assert before.shape[1:] == (channels, 64 // 2**i, 64 // 2**i) and (before < 0).any()
        assert torch.equal(clamp(before), features[f"res{i}"])


def test_published_taps_of_mobilenet_v2_are_the_expanded_maps_of_its_blocks():
    strides = ["blocks.3.0.conv_dw", 1, "blocks.4.0.conv_dw", 2]
    model = classifier("mobilenetv2_100", "timm", "MODEL.TIMM.STRIDES", strides)
    names = [f"blocks.{i}.0.pre_relu" for i in (2, 3, 4, 6)]
    features = recorded(model, names, side=224)
    assert [tuple(f.shape[1:]) for f in features.values()] == [(144, 28, 28), (192, 28, 28), (384, 14, 14), (960, 7, 7)]
    for name in names:
        path = f"backbone.net.{name.removesuffix('.pre_relu')}.bn2"
        assert torch.equal(nn.functional.relu6(features[name]), output_of(model, path, side=224))


def test_units_of_shufflenet_are_tapped_before_the_activation_of_their_branch():
    model = classifier("shufflenet_v2_x1_0", "torchvision")
    features = recorded(model, ["res3", "res3.pre_relu", "res4.pre_relu", "res5.pre_relu"], side=224)
    assert [features[f"res{i}.pre_relu"].shape[1:3] for i in (3, 4, 5)] == [(116, 28), (232, 14), (464, 7)]
    before, after = features["res3.pre_relu"], features["res3"]
    assert (before < 0).any() and torch.equal(before.relu(), after)
    branch = output_of(model, "backbone.net.stage2.3.branch2.6", side=224)
    assert torch.equal(before[:, 1::2], branch)


def test_blocks_of_a_transformer_are_tapped_as_maps():
    model = classifier("deit_tiny_patch16_224")
    tokens = output_of(model, "backbone.net.blocks.3", side=224)
    tapped = recorded(model, ["blocks.3"], side=224)["blocks.3"]
    assert tapped.shape == (1, 192, 14, 14) and torch.equal(tapped.flatten(2).transpose(1, 2), tokens[:, 1:])
    with FeatureTaps(model, ["blocks.3"]).replacing(lambda name, value: value):
        replaced = model(images(1, 224))
    assert torch.equal(replaced[0]["scores"], model(images(1, 224))[0]["scores"])
    info = describe_taps(model, ["blocks.3", "logits"])
    assert (info["blocks.3"].channels, info["blocks.3"].stride) == (192, 16) and info["logits"].is_vector


def test_stages_of_a_swin_transformer_are_tapped_with_channels_second():
    info = describe_taps(classifier("swin_s3_tiny_224"), ["res2", "res5"])
    assert [(t.channels, t.stride) for t in info.values()] == [(96, 4), (768, 32)]


@pytest.mark.parametrize(
    "network, library, taps, shapes",
    [
        ("convnext_tiny", "timm", ["res4", "res4.pre_relu"], [(384, 16), (1536, 16)]),
        ("swin_s3_tiny_224", "timm", ["patch_embed.proj", "norm", "head"], [(96, 4), (768, 32), (7, 0)]),
        ("swin_t", "torchvision", ["features.3", "features.3.pre_relu", "permute"], [(192, 8), (768, 8), (768, 32)]),
        ("xcit_nano_12_p16_224", "timm", ["blocks.3"], [(128, 16)]),
    ],
)
def test_maps_inside_a_network_have_their_channels_second(network, library, taps, shapes):
    model = classifier(network, library, "INPUT.CLASSIFICATION.SIZE", 64)
    assert [(t.channels, t.stride) for t in describe_taps(model, taps).values()] == shapes


def test_a_map_that_has_its_channels_last_after_all_is_refused():
    model = classifier("convnext_tiny")
    with pytest.raises(TapError, match=r"'stages\.2\.blocks\.0\.mlp' has the shape \(1, 8, 8, 384\)"):
        describe_taps(model, ["stages.2.blocks.0.mlp"])


# ---- bad input ----


@pytest.mark.parametrize(
    "options, message",
    [
        (["MODEL.TIMM.NAME", "mobilenetv3_larg_100"], r"'mobilenetv3_larg_100'.*mobilenetv3_large_100"),
        (["MODEL.TIMM.NAME", "resnet50.a1_in2k"], r"MODEL\.TIMM\.NAME is 'resnet50\.a1_in2k'.*resnet50\.a1_in1k"),
        (["MODEL.TIMM.OUT_FEATURES", ["res3", "res7"]], r"MODEL\.TIMM\.OUT_FEATURES is 'res7'; .*res5"),
        (["MODEL.TIMM.ARGS", ["widht", 2]], r"MODEL\.TIMM\.NAME resnet10t cannot be built.*widht"),
        (["MODEL.TIMM.ARGS", ["width"]], r"MODEL\.TIMM\.ARGS .*pairs"),
        (["MODEL.TIMM.ARGS", ["in_chans", 1]], r"MODEL\.TIMM\.ARGS has 'in_chans', .*MODEL\.PIXEL_MEAN"),
        (["MODEL.TIMM.ARGS", ["layers", [1, 1]]], r"MODEL\.TIMM\.NAME resnet10t cannot be built"),
        (["MODEL.TIMM.NAME", "resnet50."], r"MODEL\.TIMM\.NAME is 'resnet50\.': .*resnet50\.[a-z]+"),
        (["MODEL.TIMM.STRIDES", ["layer2.0.conv9", 1]], r"MODEL\.TIMM\.STRIDES names 'layer2\.0\.conv9'.*conv"),
        (["MODEL.TIMM.STRIDES", ["layer2.0.conv1", 0]], r"MODEL\.TIMM\.STRIDES, layer2\.0\.conv1: 0 is no stride"),
        (["MODEL.TIMM.NAME", "coat_tiny"], r"MODEL\.TIMM\.NAME coat_tiny takes images of 224 x 224 pixels only"),
        (["MODEL.TIMM.NAME", "cait_xxs24_224", "MODEL.TIMM.OUT_FEATURES", ["last_feat"]], r"224 x 224 pixels only"),
        (["MODEL.TIMM.NAME", "tnt_s_legacy_patch16_224"], r"tnt_s_legacy_patch16_224 .*MODEL\.TIMM"),
        (["MODEL.TIMM.ARGS", ["output_stride", 16]], r"MODEL\.FPN\.IN_FEATURES .*\[8, 16, 16\].*output_stride"),
        (["MODEL.FPN.IN_FEATURES", ["res2", "res3"]], r"MODEL\.FPN\.IN_FEATURES is 'res2'"),
        (["MODEL.FPN.IN_FEATURES", ["res3", "res4"]], r"MODEL\.FPN\.IN_FEATURES .*p6 is made from res5"),
        (["MODEL.TIMM.NAME", "eva02_tiny_patch14_224", "MODEL.TIMM.OUT_FEATURES", ["last_feat"]], r"patches of 14"),
        (["MODEL.BACKBONE.NAME", "build_timm_network"], r"build_timm_network is a whole classifier.*timm_fpn"),
        (["MODEL.TIMM.NAME", ""], r"MODEL\.TIMM\.NAME"),
        (["MODEL.TIMM.NORM", "LN"], r"MODEL\.TIMM\.NORM is 'LN'"),
        (["MODEL.TIMM.NAME", "hrnet_w18_small", "MODEL.BACKBONE.FREEZE_AT", 2], r"MODEL\.BACKBONE\.FREEZE_AT is 2"),
    ],
)  # fmt: skip
def test_a_backbone_that_cannot_be_is_one_line_with_the_key(options, message):
    with pytest.raises(Exception, match=message) as error:
        build_network(detector_config("resnet10t", "RetinaNet", *options), "--config-file")
    assert isinstance(error.value, ConfigError) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        (["MODEL.TORCHVISION.NAME", "resnet19"], r"MODEL\.TORCHVISION\.NAME is 'resnet19'.*resnet18"),
        (["MODEL.TORCHVISION.ARGS", ["depth", 3]], r"MODEL\.TORCHVISION\.NAME resnet18 cannot be built.*depth"),
        (
            ["MODEL.BACKBONE.NAME", "build_timm_network", "MODEL.TIMM.NAME", "hrnet_w18_small"]
            + ["MODEL.BACKBONE.FREEZE_AT", 2],
            r"MODEL\.BACKBONE\.FREEZE_AT is 2, .* is a list",
        ),
        (["MODEL.TORCHVISION.ARGS", ["num_classes", 3]], r"has 'num_classes', .*MODEL\.CLASSIFIER\.NUM_CLASSES"),
        (["MODEL.TORCHVISION.NAME", "vit_b_32", "INPUT.CLASSIFICATION.TEST_SIZE", 96], r"not take .*96 x 96 pixels"),
        (["MODEL.BACKBONE.NAME", "build_timm_network", "MODEL.TIMM.ARGS", ["global_pool", ""]], r"MODEL\.TIMM\.ARGS"),
        (["MODEL.MASK_ON", True], r"MODEL\.MASK_ON is True"),
        (["MODEL.CLASSIFIER.LOSS", "hinge"], r"MODEL\.CLASSIFIER\.LOSS is 'hinge'"),
        (
            ["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.CLASSIFIER.IN_FEATURE", "res6"],
            r"MODEL\.CLASSIFIER\.IN_FEATURE is 'res6'",
        ),
    ],
)
def test_a_classifier_that_cannot_be_is_one_line_with_the_key(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        classifier("resnet18", "torchvision", *options)
    assert "\n" not in str(error.value)


def test_images_of_several_sizes_are_an_error():
    with pytest.raises(ConfigError, match="images of one size"):
        classifier()([*images(1, 64), *images(1, 32)])


def test_units_of_shufflenet_go_on_with_what_is_tapped():
    model = classifier("shufflenet_v2_x1_0", "torchvision").eval()
    want = model(images(1, 64))[0]["scores"]
    with FeatureTaps(model, ["res4.pre_relu"]).recording() as features:
        found = model(images(1, 64))[0]["scores"]
    assert torch.equal(found, want)
    (gradient,) = torch.autograd.grad(found.square().sum(), features["res4.pre_relu"])
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenetv3_small_050"])
def test_an_activation_of_squeeze_and_excitation_is_no_map_of_a_stage(name):
    model = classifier(name, "timm")
    with pytest.raises(
        TapError, match=r"res4\.pre_relu': the last activation .* is not on its map, but on one of 1 x 1"
    ):
        describe_taps(model, ["res4.pre_relu"])


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_that_transform_their_input_do_so_as_torchvision_does_with_weights(name):
    assert classifier(name, "torchvision").backbone.net.transform_input
