"""The recipes for Cityscapes have the published numbers; that they build and step is in test_configs.py."""

import gc

import pytest
import torch
from runs import ROOT
from test_configs import RandomLoader, load, untrained  # noqa: F401  (a fixture)

from d2kd.distillers.receptive_tokens import TokenFile
from d2kd.engine import load_config
from d2kd.modeling import teacher_config
from d2kd.token_learning import TokenTrainer
from d2kd.token_learning import trainer as token_trainer
from detectron2.config import CfgNode

FOLDER = ROOT / "configs/Cityscapes"
RESNET, MOBILENET = "build_dilated_resnet_backbone", "build_mobilenetv2_backbone"
#: Of each published row: head, backbone, depth, width of the head, of the auxiliary head, crop, images, iterations.
MMSEG = {
    "pspnet_R101": ("PSPHead", RESNET, 101, 512, 256, [512, 1024], 8, 40000),
    "pspnet_R101_80k": ("PSPHead", RESNET, 101, 512, 256, [512, 1024], 8, 80000),
    "pspnet_R18_80k": ("PSPHead", RESNET, 18, 128, 64, [512, 1024], 8, 80000),
    "deeplabv3_R18_80k": ("ASPPHead", RESNET, 18, 128, 64, [512, 1024], 8, 80000),
    "deeplabv3_R101": ("ASPPHead", RESNET, 101, 512, 256, [512, 1024], 8, 40000),
    "deeplabv3_R101_80k": ("ASPPHead", RESNET, 101, 512, 256, [512, 1024], 8, 80000),
    "deeplabv3_MobileNetV2_80k": ("ASPPHead", MOBILENET, None, 512, 256, [512, 1024], 8, 80000),
    "pspnet_R18_40k": ("PSPHead", RESNET, 18, 128, 64, [512, 512], 16, 40000),
    "deeplabv3_R18_40k": ("ASPPHead", RESNET, 18, 128, 64, [512, 512], 16, 40000),
}
#: Student and its row above, of the recipes of MaskedGenerative.
MASKED = {"pspnet_R18_R101": "pspnet_R18_40k", "deeplabv3_R18_PSPNetR101": "deeplabv3_R18_40k"}
#: Head, backbone, depth, width of the head, of the auxiliary head (0: none), weight decay.
RELEASED = {
    "deeplabv3_R101_aligned": ("ASPPHead", RESNET, 101, 256, 256, 5e-4),
    "deeplabv3_R18_aligned": ("ASPPHead", RESNET, 18, 128, 64, 5e-4),
    "pspnet_R18_aligned": ("PSPHead", RESNET, 18, 128, 64, 5e-4),
    "deeplabv3_MobileNetV2_aligned": ("ASPPHead", MOBILENET, None, 128, 0, 2e-4),
}
TOKENS = {
    "deeplabv3_R18_R101_ReceptiveTokens_40k": "deeplabv3_R18_aligned",
    "deeplabv3_R18_R101_ReceptiveTokens_scratch_40k": "deeplabv3_R18_aligned",
    "pspnet_R18_DeepLabV3R101_ReceptiveTokens_40k": "pspnet_R18_aligned",
    "deeplabv3_MobileNetV2_R101_ReceptiveTokens_40k": "deeplabv3_MobileNetV2_aligned",
}


def read(name: str) -> CfgNode:
    return load_config(str(FOLDER / f"{name}.yaml"))


def network(cfg: CfgNode) -> tuple:
    """Head, backbone and its depth, widths of head and auxiliary head."""
    head, backbone = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.BACKBONE.NAME
    depth = cfg.MODEL.RESNETS.DEPTH if backbone == RESNET else None
    assert head.CONVS_DIM == head.ASPP_CHANNELS and head.PSP_CHANNELS == 0
    return head.NAME, backbone, depth, head.CONVS_DIM, head.AUX_CHANNELS if head.AUX_FEATURE else 0


def check_common(cfg: CfgNode) -> None:
    head, solver = cfg.MODEL.SEM_SEG_HEAD, cfg.SOLVER
    assert (cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.BACKBONE.FREEZE_AT) == ("Segmentor", 0)
    assert (head.NUM_CLASSES, head.IGNORE_VALUE, list(head.IN_FEATURES)) == (19, 255, ["res5"])
    assert (head.ASPP_DILATIONS, head.PSP_SCALES, head.DROPOUT) == ([12, 24, 36], [1, 2, 3, 6], 0.1)
    assert (head.LOSS_WEIGHT, head.AUX_LOSS_WEIGHT, head.AUX_FEATURE in ("res4", "")) == (1.0, 0.4, True)
    assert head.NORM == cfg.MODEL.RESNETS.NORM == cfg.MODEL.MOBILENETV2.NORM == "SyncBN"
    assert (solver.LR_SCHEDULER_NAME, solver.POLY_LR_POWER, solver.BASE_LR_END) == ("WarmupPolyLR", 0.9, 1e-4)
    assert (solver.OPTIMIZER, solver.MOMENTUM, solver.WARMUP_ITERS) == ("SGD", 0.9, 0)
    assert solver.WEIGHT_DECAY == solver.WEIGHT_DECAY_NORM and solver.WEIGHT_DECAY_BIAS is None
    assert not solver.CLIP_GRADIENTS.ENABLED and not cfg.TEST.SLIDING_WINDOW.ENABLED
    assert (cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.RANDOM_FLIP) == (True, "absolute", "horizontal")
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (1024, 2048)
    assert (cfg.MODEL.RESNETS.STEM_TYPE, cfg.MODEL.RESNETS.STRIDE_IN_1X1) == ("deeplab", False)
    assert (cfg.MODEL.RESNETS.RES4_DILATION, cfg.MODEL.RESNETS.RES5_DILATION) == (2, 4)
    assert cfg.MODEL.RESNETS.CONTRACT_DILATION and cfg.MODEL.MOBILENETV2.OUTPUT_STRIDE == 8


def check_mmseg(cfg: CfgNode, name: str) -> None:
    check_common(cfg)
    *networks, crop, images, iterations = MMSEG[name]
    assert network(cfg) == tuple(networks)
    assert (list(cfg.INPUT.CROP.SIZE), cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER) == (crop, images, iterations)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY) == (0.01, 5e-4)
    head = cfg.MODEL.SEM_SEG_HEAD
    assert (head.ALIGN_CORNERS, head.LOSS_AVERAGE, head.ASPP_FORM) == (False, "all", "bottleneck")
    assert (cfg.MODEL.RESNETS.STEM_OUT_CHANNELS, cfg.MODEL.RESNETS.DILATE_SECOND_CONV) == (64, False)
    assert cfg.MODEL.MOBILENETV2.DILATED_BLOCKS == "first"
    assert (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN) == ("RGB", [123.675, 116.28, 103.53])
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]
    assert list(cfg.INPUT.MIN_SIZE_TRAIN) == [512, 2048] and cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range"
    assert cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA == 0.75 and cfg.INPUT.COLOR_AUG_SSD


def check_released(cfg: CfgNode, name: str) -> None:
    check_common(cfg)
    *networks, decay = RELEASED[name]
    assert network(cfg) == tuple(networks)
    solver, head = cfg.SOLVER, cfg.MODEL.SEM_SEG_HEAD
    assert (solver.IMS_PER_BATCH, solver.MAX_ITER, solver.BASE_LR, solver.WEIGHT_DECAY) == (16, 40000, 0.02, decay)
    assert (head.ALIGN_CORNERS, head.LOSS_AVERAGE, head.ASPP_FORM, head.ASPP_DROPOUT) == (True, "valid", "project", 0.5)
    assert (cfg.MODEL.RESNETS.STEM_OUT_CHANNELS, cfg.MODEL.RESNETS.DILATE_SECOND_CONV) == (128, True)
    assert cfg.MODEL.MOBILENETV2.DILATED_BLOCKS == "following"
    assert (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN) == ("BGR", [104.007, 116.669, 122.679])
    assert cfg.MODEL.PIXEL_STD == [1.0, 1.0, 1.0] and list(cfg.INPUT.CROP.SIZE) == [512, 1024]
    assert list(cfg.INPUT.MIN_SIZE_TRAIN) == [round(1024 * (0.5 + k / 10)) for k in range(16)]
    assert cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "choice"
    assert cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA == 1.0 and not cfg.INPUT.COLOR_AUG_SSD


@pytest.mark.parametrize("name", MMSEG)
def test_networks_of_mmsegmentation_have_the_published_numbers(name):
    check_mmseg(read(name), name)


@pytest.mark.parametrize("with_logits", [True, False])
@pytest.mark.parametrize("pair", MASKED)
def test_recipes_of_masked_generative_have_the_released_numbers(pair, with_logits):
    cfg = read(f"{pair}_MaskedGenerative_{'LogitKD_' if with_logits else ''}40k")
    check_mmseg(cfg, MASKED[pair])
    check_mmseg(teacher_config(cfg), "pspnet_R101")
    node, logits = cfg.DISTILL.MASKED_GENERATIVE, cfg.DISTILL.LOGIT_KD
    assert (node.TAPS, node.WEIGHT, node.MASK_RATIO, node.MASK) == (["res5"], 2e-5, 0.75, "spatial")
    assert (node.NORMALIZE, node.REDUCTION, cfg.DISTILL.INIT_FROM_TEACHER.ENABLED) == ("none", "batchmean", False)
    assert cfg.DISTILL.METHODS == (["MaskedGenerative", "LogitKD"] if with_logits else ["MaskedGenerative"])
    if with_logits:
        assert (logits.FORM, logits.WEIGHT, logits.TEMPERATURE) == ("spatial", 3.0, 4.0)
        assert logits.TAPS == ["sem_seg_head.predictor"]


@pytest.mark.parametrize("name", RELEASED)
def test_networks_of_receptive_tokens_have_the_released_numbers(name):
    check_released(read(name), name)


@pytest.mark.parametrize("recipe", TOKENS)
def test_recipes_of_receptive_tokens_have_the_released_numbers(recipe):
    cfg, node = read(recipe), read(recipe).DISTILL.RECEPTIVE_TOKENS
    check_released(cfg, TOKENS[recipe])
    check_released(teacher_config(cfg), "deeplabv3_R101_aligned")
    heads = ["sem_seg_head.predictor", "sem_seg_head.auxiliary.predictor"]
    heads = heads if cfg.MODEL.SEM_SEG_HEAD.AUX_FEATURE else heads[:1]
    assert node.TAPS == heads and not node.TEACHER_TAPS
    assert (node.TOKEN_TAPS or node.TAPS) == ["sem_seg_head.predictor"] * len(heads)
    assert node.TAP_WEIGHTS == ([1.0, 0.4] if len(heads) == 2 else [])
    assert (node.WEIGHT, node.EPS, node.CUSTOMIZE, node.ALIGN) == (0.5, 1e-5, False, "auto")
    assert (node.NORMALIZE, node.POSITION_WEIGHTS) == ("none", "mask_sum")
    assert (cfg.DISTILL.METHODS, cfg.DISTILL.INIT_FROM_TEACHER.ENABLED) == (["ReceptiveTokens"], False)
    assert (cfg.MODEL.WEIGHTS == "") == ("scratch" in recipe)


def test_every_recipe_is_held_to_its_numbers():
    held = {*MMSEG, *RELEASED, *TOKENS, "deeplabv3_R101_aligned_tokens", "deeplabv3_MobileNetV3_80k"}
    held |= {f"{pair}_MaskedGenerative_{kind}40k" for pair in MASKED for kind in ("", "LogitKD_")}
    assert {path.stem for path in FOLDER.glob("*.yaml")} == held
    assert all(len(path.read_text().splitlines()) <= 15 for path in FOLDER.glob("*.yaml"))


def test_tokens_are_learned_with_the_released_numbers_and_take_a_step(untrained, monkeypatch, tmp_path):  # noqa: F811
    cfg = load(FOLDER / "deeplabv3_R101_aligned_tokens.yaml")
    check_released(read("deeplabv3_R101_aligned_tokens"), "deeplabv3_R101_aligned")
    node = cfg.DISTILL.RECEPTIVE_TOKENS
    learn = node.LEARN
    assert (learn.OPTIMIZER, learn.BASE_LR, learn.WEIGHT_DECAY, learn.SCHEDULE) == ("SGD", 0.1, 0.001, "poly")
    assert (learn.NUM_TOKENS, learn.WEIGHTING, learn.ITERATIONS, node.TAPS) == (
        8, False, 10000, ["sem_seg_head.predictor"],
    )  # fmt: skip
    learn.ITERATIONS, learn.PICTURES = 1, 0
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64  # as the head sees it, and quicker
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = "random.pth", str(tmp_path)
    torch.manual_seed(1)
    monkeypatch.setattr(token_trainer, "load_strictly", lambda net, *names: None)
    monkeypatch.setattr(RandomLoader, "records", [], raising=False)
    run = TokenTrainer(cfg)
    solver = run.cfg.SOLVER
    assert (solver.LR_SCHEDULER_NAME, solver.POLY_LR_POWER, solver.BASE_LR_END) == ("WarmupPolyLR", 0.9, 0.0)
    before = run.learner.levels[0].tokens.clone()
    run.train()
    assert not torch.equal(run.learner.levels[0].tokens, before)
    assert TokenFile.load(run.result_file).levels["sem_seg_head.predictor"].tokens.tokens.shape == (8, 19)
    del run
    gc.collect()
