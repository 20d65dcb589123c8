"""Dilated backbones, DeepLabV3, PSPNet and their inference against recordings of two official implementations."""

import pytest
import torch
from models import config
from seg_golden import (
    MOBILENET,
    RESNET,
    Recording,
    assert_close,
    assert_gradients,
    assert_statistics,
    cotangent,
    head_name,
    load_strictly,
    ours,
)
from torch import Tensor, nn
from torch.nn import functional as F

from d2kd.modeling.meta_arch import Segmentor
from d2kd.modeling.sem_seg import SlidingWindows, pixel_accuracy, resize_logits
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import Backbone, build_backbone, build_model, build_sem_seg_head
from detectron2.modeling.postprocessing import sem_seg_postprocess

DILATED = {
    "MODEL.BACKBONE.NAME": "build_dilated_resnet_backbone",
    "MODEL.RESNETS.STEM_TYPE": "deeplab",
    "MODEL.RESNETS.RES4_DILATION": 2,
    "MODEL.RESNETS.RES5_DILATION": 4,
}
ALL = ["res2", "res3", "res4", "res5"]


def resnet_config(recorded: dict) -> CfgNode:
    depth, base = recorded["depth"], recorded["base_channels"]
    assert recorded["strides"] == [1, 2, 1, 1] and recorded["dilations"] == [1, 1, 2, 4]
    changes = {
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": recorded["stem_channels"],
        "MODEL.RESNETS.WIDTH_PER_GROUP": base,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": base if depth < 50 else 4 * base,
        "MODEL.RESNETS.CONTRACT_DILATION": recorded["contract_dilation"],
        "MODEL.RESNETS.OUT_FEATURES": ALL,
    }
    return config({**DILATED, **changes})


def mobilenet_config(recorded: dict) -> CfgNode:
    assert recorded["dilations"] == [1, 1, 1, 2, 2, 4, 4] and recorded["out_indices"] == [1, 2, 4, 6]
    changes = {"MODEL.MOBILENETV2.WIDTH": recorded["widen"], "MODEL.MOBILENETV2.OUT_FEATURES": ALL}
    return config({"MODEL.BACKBONE.NAME": "build_mobilenetv2_backbone", **changes})


@pytest.mark.parametrize(
    "name, make, rules",
    [
        ("backbone_resnet18_v1c", resnet_config, RESNET),
        ("backbone_resnet50_v1c", resnet_config, RESNET),
        ("backbone_mobilenetv2", mobilenet_config, MOBILENET),
    ],
)
def test_dilated_backbones_are_as_recorded(name, make, rules):
    recorded = Recording(name)
    net = build_backbone(make(recorded.config)).double()
    load_strictly(net, {ours(key, rules): value for key, value in recorded.weights().items()})
    image = recorded["image"].requires_grad_()
    with torch.no_grad():
        outputs = net.eval()(image).values()
    for i, out in enumerate(outputs):
        assert_close(out[:1], recorded[f"eval/out/{i}"], f"eval {i}")
    outputs = list(net.train()(image).values())
    for i, out in enumerate(outputs):
        assert_close(out[:, :, ::2, ::2], recorded[f"train/out/{i}"], f"train {i}")
    total = sum((out * cotangent(out)).sum() for out in outputs)
    assert total.item() == pytest.approx(recorded["train/sum_out_times_cotangent"].item(), rel=1e-8)
    total.backward()
    if "grad_image" in recorded:
        assert_close(image.grad, recorded["grad_image"], "image")
    assert assert_gradients(net, recorded, lambda key: ours(key, rules)) > 50
    assert_statistics(net, recorded, lambda key: ours(key, rules))
    assert net.output_shape()["res5"].stride == net.output_shape()["res3"].stride == 8


def head_config(recorded: dict) -> CfgNode:
    """The head of mmsegmentation's form."""
    changes = {
        "NAME": {"PSPNet": "PSPHead", "DeepLabV3": "ASPPHead"}[recorded["kind"]],
        "IN_FEATURES": ["res5"],
        "NUM_CLASSES": recorded["num_classes"],
        "CONVS_DIM": recorded["channels"],
        "ASPP_CHANNELS": recorded["channels"],
        "ASPP_FORM": "bottleneck",
        "NORM": "BN",
        "DROPOUT": recorded["dropout"],
        "ALIGN_CORNERS": recorded["align_corners"],
        "LOSS_AVERAGE": "all",
        "IGNORE_VALUE": recorded["ignore_index"],
        "AUX_FEATURE": "res4",
        "AUX_CHANNELS": recorded["aux_channels"],
        "AUX_LOSS_WEIGHT": recorded["aux_weight"],
    }
    if recorded["dilations"]:
        assert recorded["dilations"][0] == 1
        changes["ASPP_DILATIONS"] = recorded["dilations"][1:]
    if recorded["pool_scales"]:
        changes["PSP_SCALES"] = recorded["pool_scales"]
    return config({f"MODEL.SEM_SEG_HEAD.{key}": value for key, value in changes.items()})


@pytest.mark.parametrize("name", ["seg_pspnet", "seg_pspnet_aligned", "seg_deeplabv3", "seg_deeplabv3_aligned"])
def test_heads_are_as_recorded(name):
    recorded = Recording(name)
    features = {"res4": recorded["feat/stage3"].requires_grad_(), "res5": recorded["feat/stage4"].requires_grad_()}
    shapes = {key: ShapeSpec(channels=x.shape[1], stride=8) for key, x in features.items()}
    head = build_sem_seg_head(head_config(recorded.config), shapes).double()
    inner = nn.ModuleDict({"sem_seg_head": head})
    load_strictly(inner, {head_name(key): value for key, value in recorded.weights().items()})
    labels = recorded["label"].long()
    size, align = tuple(labels.shape[-2:]), recorded.config["align_corners"]
    with torch.no_grad():
        logits = head.eval().layers(features)
        assert_close(logits[:1], recorded["eval/main_logits"], "main")
        assert_close(head.auxiliary(features["res4"])[:1], recorded["eval/aux_logits"], "aux")
        upsampled = resize_logits(logits, size, align)
        assert_close(upsampled[:, :, ::16, ::16], recorded["eval/upsampled_logits_every16"], "upsampled")
        assert_close(upsampled.argmax(1), recorded["eval/argmax"], "argmax")
    seen = {}
    for kind, module in (("main", head.predictor), ("aux", head.auxiliary.predictor)):
        module.register_forward_hook(lambda module, args, out, kind=kind: seen.update({kind: out}))
    losses = head.train()(features, labels)[1]
    for kind, logits in seen.items():
        assert_close(logits, recorded[f"train/{kind}_logits"], f"train {kind}")
        accuracy = pixel_accuracy(resize_logits(logits, size, align), labels, 255)
        assert accuracy.item() == pytest.approx(recorded[f"loss/{kind}_accuracy_percent"].item(), rel=1e-5)
    total = sum(losses.values())
    found = {"main": losses["loss_sem_seg"], "aux": losses["loss_sem_seg_aux"], "total": total}
    for kind, loss in found.items():
        assert loss.item() == pytest.approx(recorded[f"loss/{kind}"].item(), rel=1e-8)
    total.backward()
    for stage, feature in (("stage3", "res4"), ("stage4", "res5")):
        if f"grad_feat/{stage}" in recorded:
            assert_close(features[feature].grad, recorded[f"grad_feat/{stage}"], stage)
    assert assert_gradients(inner, recorded, head_name) > 15
    assert_statistics(inner, recorded, head_name)


class _RecordedBackbone(Backbone):
    """Three convolutions of stride 2."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = (nn.Conv2d(3 if i == 0 else 6, 6, 3, 2, 1) for i in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for conv in (self.c1, self.c2, self.c3):
            x = conv(x).relu()
        return {"res5": x}


class _RecordedHead(nn.Module):
    """A 3x3 convolution and a classifier."""

    def __init__(self, num_classes: int, align_corners: bool) -> None:
        super().__init__()
        self.conv = Conv2d(6, 6, 3, padding=1, bias=False, norm=nn.BatchNorm2d(6), activation=F.relu)
        self.predictor = nn.Conv2d(6, num_classes, 1)
        self.align_corners = align_corners

    def layers(self, features: dict[str, Tensor]) -> Tensor:
        return self.predictor(self.conv(features["res5"]))


def inference_model(recorded: Recording, case: str, slides: bool) -> Segmentor:
    crop, stride = recorded[f"{case}/crop"].tolist(), recorded[f"{case}/stride"].tolist()
    net = Segmentor(
        windows=SlidingWindows(tuple(crop), tuple(stride), batch=4) if slides else None,
        backbone=_RecordedBackbone(),
        sem_seg_head=_RecordedHead(recorded.config["num_classes"], bool(recorded[f"{case}/align_corners"])),
        pixel_mean=[0.0, 0.0, 0.0],
        pixel_std=[1.0, 1.0, 1.0],
    ).double()
    names = {"head.convs.0.conv.": "sem_seg_head.conv.", "head.convs.0.bn.": "sem_seg_head.conv.norm."}
    names["head.conv_seg."] = "sem_seg_head.predictor."
    weights = {}
    for key, value in recorded.weights().items():
        for old, new in names.items():
            key = key.replace(old, new)
        weights[key] = value
    load_strictly(net, weights)
    return net.eval()


def every(x: Tensor, n: int) -> Tensor:
    return x[..., ::n, ::n]


@pytest.mark.parametrize("case", ["slide", "slide_small_image", "slide_exact"])
def test_inference_is_as_recorded(case):
    recorded = Recording("seg_inference")
    inputs = [{"image": recorded[f"{case}/image"][0]}]
    net = inference_model(recorded, case, slides=True)
    seen = []
    net.backbone.register_forward_pre_hook(lambda module, args: seen.extend(x.shape[-2:] for x in args[0]))
    with torch.no_grad():
        (output,) = net(inputs)
        (whole,) = inference_model(recorded, case, slides=False)(inputs)
    assert [list(size) for size in seen] == recorded[f"{case}/window_sizes"].tolist()
    logits = output["sem_seg"][None]
    if f"{case}/logits" in recorded:
        assert_close(logits, recorded[f"{case}/logits"], case)
    if f"{case}/logits_every3" in recorded:
        assert_close(every(logits, 3), recorded[f"{case}/logits_every3"], case)
    assert_close(logits.argmax(1), recorded[f"{case}/argmax"], "argmax")
    assert_close(every(whole["sem_seg"][None], 4), recorded[f"{case}/whole_logits_every4"], "whole")


def test_padding_and_flip_are_undone_as_recorded():
    recorded = Recording("seg_inference")
    with torch.no_grad():
        (whole,) = inference_model(recorded, "slide", slides=False)([{"image": recorded["slide/image"][0]}])
    left, right, top, bottom = recorded["post/padding_left_right_top_bottom"].tolist()
    assert left == top == 0  # as Detectron2 pads
    h, w = (n - padding for n, padding in zip(whole["sem_seg"].shape[-2:], (bottom, right)))
    # as `SegmentorWithTTA` does it: in the size of the output
    logits = sem_seg_postprocess(whole["sem_seg"], (h, w), *recorded["post/ori_shape"].tolist()).flip(-1)[None]
    assert_close(every(logits, 4), recorded["post/logits_every4"], "post")
    assert_close(logits.argmax(1), recorded["post/argmax"], "argmax")


def released_config(recorded: dict) -> CfgNode:
    """The networks that the release of receptive tokens trains."""
    kind, mobile = recorded["model"], recorded["backbone"] == "mobilenetv2"
    changes = {
        "MODEL.META_ARCHITECTURE": "Segmentor",
        "MODEL.PIXEL_MEAN": [0.0, 0.0, 0.0],
        "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
        "MODEL.RESNETS.DEPTH": 18,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 128,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
        "MODEL.RESNETS.DILATE_SECOND_CONV": True,
        "MODEL.RESNETS.OUT_FEATURES": ALL,
        "MODEL.SEM_SEG_HEAD.NAME": "PSPHead" if kind == "psp" else "ASPPHead",
        "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["res5"],
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": recorded["num_classes"],
        "MODEL.SEM_SEG_HEAD.CONVS_DIM": 128,
        "MODEL.SEM_SEG_HEAD.ASPP_CHANNELS": 128,
        "MODEL.SEM_SEG_HEAD.ASPP_DROPOUT": recorded["dropout"],
        "MODEL.SEM_SEG_HEAD.DROPOUT": recorded["dropout"],
        "MODEL.SEM_SEG_HEAD.NORM": "BN",
        "MODEL.SEM_SEG_HEAD.ALIGN_CORNERS": recorded["align_corners"],
        "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": recorded["ignore"],
        "MODEL.SEM_SEG_HEAD.AUX_FEATURE": "res4" if recorded["aux"] else "",
        "MODEL.SEM_SEG_HEAD.AUX_CHANNELS": 64,
        "MODEL.SEM_SEG_HEAD.AUX_LOSS_WEIGHT": recorded["aux_weight"],
    }
    if mobile:
        changes["MODEL.BACKBONE.NAME"] = "build_mobilenetv2_backbone"
        changes["MODEL.MOBILENETV2.DILATED_BLOCKS"] = "following"
        changes["MODEL.MOBILENETV2.OUT_FEATURES"] = ALL
    return config({**DILATED, **changes})


def released_name(name: str) -> str:
    if name.startswith("pretrained."):
        name = name.removeprefix("pretrained.")
        return "backbone." + ours(name, MOBILENET if name.startswith("net.") else RESNET)
    return head_name(name)


@pytest.mark.parametrize("name", ["maskd_net_pspnet_r18", "maskd_net_deeplabv3_r18", "maskd_net_deeplabv3_mbv2"])
def test_the_other_networks_are_as_recorded(name):
    import numpy as np

    recorded = Recording(name)
    net = build_model(released_config(recorded.config)).double()
    weights = recorded.weights()
    assert_close(next(iter(weights.values())).flatten()[:8], recorded["param_check_first8"], "seeds")
    load_strictly(net, {released_name(key): value for key, value in weights.items()})
    values = np.random.RandomState(recorded.config["image_seed"]).standard_normal(recorded.config["image_shape"])
    image = torch.from_numpy(values.astype(np.float16).astype(np.float64)).requires_grad_()
    labels = recorded["label"].long()
    head = net.sem_seg_head
    with torch.no_grad():
        features = net.eval().backbone(image)
        for i, feature in enumerate(features.values()):
            key = f"eval/stage{i + 1}_every"
            if key in recorded:
                assert_close(subsample(feature, recorded[key]), recorded[key], key)
        assert_close(head.layers(features)[:1], recorded["eval/main_logits"], "main")
        if head.auxiliary is not None:
            assert_close(head.auxiliary(features["res4"])[:1], recorded["eval/aux_logits"], "aux")
        found = torch.stack([out["sem_seg"].argmax(0) for out in net([{"image": x} for x in image])])
        assert_close(found, recorded["eval/argmax"], "argmax")
    seen = {}
    head.predictor.register_forward_hook(lambda module, args, out: seen.update(main=out))
    if head.auxiliary is not None:
        head.auxiliary.predictor.register_forward_hook(lambda module, args, out: seen.update(aux=out))
    losses = net.train()([{"image": x, "sem_seg": y} for x, y in zip(image, labels)])
    for kind, logits in seen.items():
        assert_close(every(logits, 2), recorded[f"train/{kind}_logits"], f"train {kind}")
    total = sum(losses.values())
    found = {"loss/main": losses["loss_sem_seg"], "loss/total": total}
    if head.auxiliary is not None:
        found["loss/aux_before_weight"] = losses["loss_sem_seg_aux"] / recorded.config["aux_weight"]
    for key, loss in found.items():
        assert loss.item() == pytest.approx(recorded[key].item(), rel=1e-8)
    total.backward()
    assert_close(every(image.grad, 4), recorded["grad_image_every4"], "image")
    assert assert_gradients(net, recorded, released_name) > 80
    assert set(losses) == ({"loss_sem_seg", "loss_sem_seg_aux"} if recorded.config["aux"] else {"loss_sem_seg"})


def subsample(feature: Tensor, like: Tensor) -> Tensor:
    """The first image and as many channels, rows and columns, evenly spaced, as a recording has."""
    x = feature[:1]
    for dim in (1, 2, 3):
        step = -(-x.shape[dim] // like.shape[dim])
        x = x.index_select(dim, torch.arange(0, x.shape[dim], step))
    return x
