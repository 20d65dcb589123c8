"""Every YAML in configs/ loads, builds its student and its teacher, and runs one training step and one inference."""

import gc
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ROOT
from torch import nn

from d2kd.distillers import DISTILLERS
from d2kd.distillers.checksum import weights_checksum
from d2kd.distillers.receptive_tokens import LearnedLevel, TokenFile
from d2kd.distillers.receptive_tokens.tokens import Tokens
from d2kd.engine import DistillTrainer, load_config
from d2kd.modeling import build, is_distillation, teacher_config
from d2kd.modeling.taps import describe_taps
from d2kd.token_learning import TokenTrainer
from d2kd.token_learning import trainer as token_trainer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
#: Small images for the models that want a size, in pixels; a probe of the taps has 128.
SMALL = ["MODEL.VIT.IMG_SIZE", 128, "MODEL.VIT.SQUARE_PAD", 128, "INPUT.CLASSIFICATION.SIZE", 64]


def load(path: Path) -> CfgNode:
    """A configuration for one step on the CPU, otherwise as it is."""
    cfg = load_config(str(path), ["MODEL.DEVICE", "cpu", *SMALL])
    cfg.DISTILL.TEACHER.OPTS = [*cfg.DISTILL.TEACHER.OPTS, *SMALL]
    cfg.DISTILL.TEACHER.EVAL_FIRST = False
    cfg.DATASETS.TEST = ()
    cfg.MODEL.TIMM.WEIGHTS = cfg.MODEL.TORCHVISION.WEIGHTS = ""
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS = 1, (), 0
    cfg.SOLVER.MAX_EPOCHS, cfg.SOLVER.STEP_EPOCHS, cfg.SOLVER.WARMUP_EPOCHS = 0.0, [], 0.0
    cfg.SOLVER.CHECKPOINT_EPOCHS = cfg.TEST.EVAL_EPOCHS = 0.0
    cfg.SOLVER.AMP.PRECISION = "bfloat16"
    cfg.DISTILL.MASKED_TEACHER.KEEP = min(cfg.DISTILL.MASKED_TEACHER.KEEP, 8)  # of the 16 patches of small images
    cfg.SOLVER.IMS_PER_BATCH = 1024  # by this, a tracking pass has but a few of the loader's small batches
    cfg.SEED = 1
    return cfg


def what_runs(path: Path) -> str:
    """Two configurations with the same text here differ in schedule, data and names of files only."""
    cfg = load(path)
    models = [cfg.MODEL, teacher_config(cfg).MODEL] if is_distillation(cfg) else [cfg.MODEL]
    for model in models:
        model.WEIGHTS = model.TIMM.WEIGHTS = model.TORCHVISION.WEIGHTS = ""
    cfg.DISTILL.TEACHER.CONFIG_FILE = cfg.DISTILL.TEACHER.WEIGHTS = ""
    solver = cfg.SOLVER
    rest = [cfg.INPUT.FORMAT, solver.OPTIMIZER, solver.CLIP_GRADIENTS, solver.AMP, solver.ACCUMULATE, solver.EMA]
    distill = [cfg.DISTILL] if len(models) == 2 else []  # the tokens of a teacher are learned in a test of their own
    return "".join(map(str, [*models, *distill, *rest]))


def groups() -> dict[str, list[Path]]:
    """Configurations by what runs, in groups that are tested by their first one."""
    found: dict[str, list[Path]] = {}
    for path in CONFIGS:
        found.setdefault(what_runs(path), []).append(path)
    return found


def config_name(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs").with_suffix(""))


def random_input(seed: int) -> dict[str, Any]:
    """An image of 64 x 64 pixels with whatever a model may learn from: boxes, masks, classes of pixels, one class."""
    generator = torch.Generator().manual_seed(seed)
    truth = Instances((64, 64))
    truth.gt_boxes = Boxes(torch.tensor([[6.0, 8.0, 30.0, 40.0], [20.0, 4.0, 60.0, 50.0]]))
    truth.gt_classes = torch.tensor([0, 1])
    truth.gt_masks = BitMasks(torch.zeros(2, 64, 64, dtype=torch.bool))
    for mask, (x0, y0, x1, y1) in zip(truth.gt_masks.tensor, truth.gt_boxes.tensor.int().tolist()):
        mask[y0:y1, x0:x1] = True
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=generator)
    per_pixel = torch.randint(0, 2, (64, 64), generator=generator)
    return {"image": image, "height": 64, "width": 64, "instances": truth, "sem_seg": per_pixel, "label": seed}


class RandomLoader:
    """Batches of two random images."""

    seed, start = 1, 0

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        while True:
            yield [random_input(0), random_input(1)]


def give_tokens(cfg: CfgNode, teacher: nn.Module, path: Path) -> None:
    """Writes random receptive tokens for every feature of the teacher's backbone, or those that are asked for."""
    node = cfg.DISTILL.RECEPTIVE_TOKENS
    shapes = {**teacher.backbone.output_shape(), **describe_taps(teacher, node.TOKEN_TAPS or node.TAPS)}
    levels = {tap: LearnedLevel(Tokens(torch.randn(2, s.channels), None, None), 0.0) for tap, s in shapes.items()}
    TokenFile(weights_checksum(teacher.state_dict()), levels, 1).save(str(path))
    cfg.DISTILL.RECEPTIVE_TOKENS.FILE = str(path)


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CfgNode:
    """Makes trainers run on random images, with random teachers, and write no checkpoints."""
    for trainer in (DistillTrainer, TokenTrainer):
        monkeypatch.setattr(trainer, "check_config", classmethod(lambda cls, cfg: None))
        monkeypatch.setattr(trainer, "build_train_loader", staticmethod(lambda cfg: RandomLoader()))
        monkeypatch.setattr(trainer, "save", lambda self, name: None)
        monkeypatch.setattr(trainer, "build_writers", lambda self: [])


def one_step(cfg: CfgNode) -> tuple[DistillTrainer, dict[str, float]]:
    """A trainer after one step, and its losses."""
    run = DistillTrainer(cfg)
    run.train()
    return run, {k: v for k, (v, _) in run.storage.latest().items() if "loss" in k or k.startswith("distill/")}


@pytest.mark.parametrize("path", CONFIGS, ids=config_name)
def test_loads_with_all_its_keys(path):
    cfg = load(path)
    assert cfg.MODEL.META_ARCHITECTURE and cfg.DATASETS.TRAIN
    if is_distillation(cfg):
        assert teacher_config(cfg).MODEL.META_ARCHITECTURE


def test_every_method_has_a_recipe_of_its_own_for_photo_digits():
    configs = [load_config(str(path)) for path in (ROOT / "configs/PhotoDigits").glob("*.yaml")]
    alone = {cfg.DISTILL.METHODS[0] for cfg in configs if is_distillation(cfg) and len(cfg.DISTILL.METHODS) == 1}
    together = [cfg for cfg in configs if is_distillation(cfg) and len(cfg.DISTILL.METHODS) > 1]
    assert alone == {name for name, _ in DISTILLERS} and len(together) >= 2


#: Of each published row: weight, warm-up, (weight, beta) of the head's term, inherits, learning rate, clipping.
TOKEN_RECIPES = {
    "faster_rcnn_R50_R101": (1.0, 7330, (1.0, 1.0), False, 0.02, None),
    "faster_rcnn_R50_CascadeX101": (1.0, 5000, (1.0, 1.0), False, 0.02, None),
    "retinanet_R50_R101": (7.0, 7000, (1.0, 0.0), True, 0.02, 35.0),
    "retinanet_R50_X101": (7.0, 8500, (1.0, 1.0), True, 0.02, 35.0),
    "fcos_R50_R101": (10.0, 5000, None, False, 0.01, 35.0),
    "reppoints_R50_X101": (10.0, 5000, (1.0, 0.11), False, 0.01, None),
}
#: Of each teacher: optimizer, learning rate and weight decay of its tokens.
TOKEN_LEARNING = {
    "faster_rcnn_R101": ("SGD", 0.1, 1e-4),
    "cascade_mask_rcnn_X101": ("Adam", 0.01, 0.1),
    "retinanet_R101": ("Adam", 0.01, 0.001),
    "retinanet_X101": ("Adam", 0.01, 0.001),
    "fcos_R101": ("Adam", 0.01, 0.001),
    "reppoints_X101": ("Adam", 0.01, 0.001),
}


def clipping(cfg: CfgNode) -> float | None:
    """The largest norm of the whole gradient, if it is clipped."""
    node = cfg.SOLVER.CLIP_GRADIENTS
    assert not node.ENABLED or node.CLIP_TYPE == "full_model"
    return node.CLIP_VALUE if node.ENABLED else None


def scales(pair: str) -> list[int]:
    """Lengths of the short side that images of a published row of ReceptiveTokens have."""
    return [640, 800] if "fcos" in pair else [800]


@pytest.mark.parametrize("pair", TOKEN_RECIPES)
def test_recipes_of_receptive_tokens_have_the_released_numbers(pair):
    cfg = load_config(str(ROOT / f"configs/COCO/{pair}_ReceptiveTokens_2x.yaml"))
    node, head, solver = cfg.DISTILL.RECEPTIVE_TOKENS, cfg.DISTILL.HEAD_REGRESSION, cfg.SOLVER
    term = (head.WEIGHT, head.BETA) if "HeadRegression" in cfg.DISTILL.METHODS else None
    found = (node.WEIGHT, node.WARMUP_ITERS, term, cfg.DISTILL.INIT_FROM_TEACHER.ENABLED, solver.BASE_LR, clipping(cfg))
    assert found == TOKEN_RECIPES[pair]
    assert (node.ALIGN, node.NORMALIZE, node.POSITION_WEIGHTS) == ("conv", "none", "mask_sum")
    assert node.CUSTOMIZE and len(node.TAPS) == 5
    assert (solver.MAX_ITER, list(solver.STEPS), solver.IMS_PER_BATCH) == (180000, [120000, 160000], 16)
    assert list(cfg.INPUT.MIN_SIZE_TRAIN) == scales(pair)


@pytest.mark.parametrize("teacher", TOKEN_LEARNING)
def test_tokens_are_learned_with_the_released_numbers(teacher):
    cfg = load_config(str(ROOT / f"configs/COCO/{teacher}_tokens.yaml"))
    learn = cfg.DISTILL.RECEPTIVE_TOKENS.LEARN
    assert (learn.OPTIMIZER, learn.BASE_LR, learn.WEIGHT_DECAY) == TOKEN_LEARNING[teacher]
    assert (learn.NUM_TOKENS, learn.WEIGHTING, learn.ITERATIONS, cfg.SOLVER.IMS_PER_BATCH) == (6, True, 2000, 16)
    assert clipping(cfg) == (35.0 if "fcos" in teacher else None)
    assert list(cfg.INPUT.MIN_SIZE_TRAIN) == scales(teacher)


def test_recipes_of_masked_generative_have_the_papers_numbers():
    paths = list((ROOT / "configs/COCO").glob("*MaskedGenerative*.yaml"))
    assert len(paths) >= 10
    for path in paths:
        cfg = load_config(str(path))
        node, dense = cfg.DISTILL.MASKED_GENERATIVE, path.stem.startswith(("reppoints", "retinanet", "solo"))
        assert (node.WEIGHT, node.MASK_RATIO) == ((2e-5, 0.65) if dense else (5e-7, 0.45)), path
        assert (node.NORMALIZE, node.REDUCTION, clipping(cfg)) == ("none", "batchmean", 35.0), path
        assert cfg.DISTILL.INIT_FROM_TEACHER.ENABLED == dense, path


#: Of each published row of classification: teacher, student, classes, images a batch, epochs, epochs of the steps,
#: rate, largest norm of the gradient.
CLASSIFIERS = {
    "ImageNet/resnet18_R34_MaskedGenerative_100e": ("resnet34", "resnet18", 1000, 256, 100, [30, 60, 90], 0.1, None),
    "ImageNet/mobilenetv1_R50_MaskedGenerative_100e": (
        "resnet50", "mobilenetv1_100", 1000, 256, 100, [30, 60, 90], 0.1, 5.0,
    ),
    "ImageNet/mobilenetv1_R50_ChannelMatching_130e": (
        "resnet50", "mobilenetv1_100", 1000, 256, 130, [41, 71, 91], 0.1, None,
    ),
    "ImageNet/resnet50_R152_ChannelMatching_100e": ("resnet152", "resnet50", 1000, 256, 100, [31, 61, 81], 0.1, None),
    "CUB200/mobilenetv2_R50_ChannelMatching": ("resnet50", "mobilenetv2_100", 200, 64, 120, [31, 61, 81], 0.01, None),
    "CUB200/shufflenetv2_R50_ChannelMatching": (
        "resnet50", "shufflenet_v2_x1_0", 200, 64, 120, [31, 61, 81], 0.01, None,
    ),
    "CUB200/shufflenetv2_R50_ChannelMatching_LogitKD": (
        "resnet50", "shufflenet_v2_x1_0", 200, 64, 120, [31, 61, 81], 0.01, None,
    ),
}  # fmt: skip


def network_name(cfg: CfgNode) -> str:
    """The network of a classifier's configuration, by its library's name."""
    return cfg.MODEL.TIMM.NAME if "timm" in cfg.MODEL.BACKBONE.NAME else cfg.MODEL.TORCHVISION.NAME


@pytest.mark.parametrize("recipe", CLASSIFIERS)
def test_recipes_of_classifiers_have_the_published_numbers(recipe):
    cfg = load_config(str(ROOT / f"configs/{recipe}.yaml"))
    teacher, solver = teacher_config(cfg), cfg.SOLVER
    assert (
        network_name(teacher), network_name(cfg), cfg.MODEL.CLASSIFIER.NUM_CLASSES, solver.IMS_PER_BATCH,
        solver.MAX_EPOCHS, solver.STEP_EPOCHS, solver.BASE_LR, clipping(cfg),
    ) == CLASSIFIERS[recipe]  # fmt: skip
    assert (solver.MOMENTUM, solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM, solver.GAMMA) == (0.9, 1e-4, 1e-4, 0.1)
    assert not cfg.DISTILL.INIT_FROM_TEACHER.ENABLED
    inputs = cfg.INPUT.CLASSIFICATION
    assert (inputs.SIZE, inputs.CROP_PCT, inputs.HFLIP, inputs.COLOR_JITTER) == (224, 0.875, 0.5, 0.0)
    assert (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_STD) == ("RGB", [58.395, 57.12, 57.375])
    if "MaskedGenerative" in recipe:
        node = cfg.DISTILL.MASKED_GENERATIVE
        assert (node.WEIGHT, node.MASK_RATIO, node.MASK, node.TAPS) == (7e-5, 0.15, "channel", ["res5"])
        assert (node.NORMALIZE, node.REDUCTION, solver.NESTEROV) == ("none", "batchmean", False)
    else:
        assert cfg.DISTILL.CHANNEL_MATCHING.REDUCER == "amp" and solver.NESTEROV
    if "LogitKD" in cfg.DISTILL.METHODS:
        assert (cfg.DISTILL.LOGIT_KD.WEIGHT, cfg.DISTILL.LOGIT_KD.TEMPERATURE) == (1.0, 1.5)
    if recipe.endswith("130e"):
        assert (solver.WARMUP_EPOCHS, solver.WARMUP_FACTOR) == (10, 0.1)
    else:
        assert solver.WARMUP_ITERS == solver.WARMUP_EPOCHS == 0


@pytest.mark.parametrize(
    "recipe, teacher, student",
    [
        ("deit_tiny_DeiT3S_MaskedTeacher_300e", "deit3_small_patch16_224.fb_in1k", "deit_tiny_patch16_224"),
        ("deit_small_DeiTB_MaskedTeacher_300e", "deit_base_patch16_224.fb_in1k", "deit_small_patch16_224"),
    ],
)
def test_recipes_of_masked_teachers_have_the_published_numbers(recipe, teacher, student):
    cfg = load_config(str(ROOT / f"configs/ImageNet/{recipe}.yaml"))
    solver, inputs, distill = cfg.SOLVER, cfg.INPUT.CLASSIFICATION, cfg.DISTILL
    assert (network_name(teacher_config(cfg)), network_name(cfg)) == (teacher, student)
    assert (solver.MAX_EPOCHS, solver.WARMUP_EPOCHS, solver.IMS_PER_BATCH) == (300, 5, 1024)
    assert solver.BASE_LR == pytest.approx(5e-4 * 1024 / 512) and solver.BASE_LR_END == 1e-5
    assert solver.WARMUP_FACTOR * solver.BASE_LR == pytest.approx(1e-6)
    assert (solver.OPTIMIZER, solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM) == ("AdamW", 0.05, 0.0)
    assert (solver.AMP.ENABLED, solver.EMA.ENABLED, cfg.MODEL.TIMM.DROP_PATH_RATE) == (True, False, 0.1)
    assert (inputs.AUTO_AUGMENT, inputs.MIXUP, inputs.CUTMIX) == ("rand-m9-mstd0.5-inc1", 0.8, 1.0)
    assert (inputs.ERASING.PROB, inputs.COLOR_JITTER, inputs.SIZE, inputs.CROP_PCT) == (0.25, 0.3, 224, 0.875)
    assert (cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING, cfg.DATALOADER.REPEATS) == (0.1, 3)
    assert cfg.DATALOADER.SAMPLER_TRAIN == "RepeatAugSampler"
    alpha = distill.LOGIT_KD.WEIGHT
    assert (alpha, distill.TASK_WEIGHT, distill.LOGIT_KD.TEMPERATURE) == (0.5, 1 - alpha, 1.0)
    assert (distill.MASKED_TEACHER.KEEP, distill.MASKED_TEACHER.SELECTOR) == (98, "student")


def test_the_recipe_of_channel_matching_and_its_control_differ_in_the_weight_only():
    recipe, control = (
        load_config(str(ROOT / f"configs/COCO/retinanet_R18_R50_ChannelMatching_{kind}.yaml"))
        for kind in ("1x", "control_1x")
    )
    node = recipe.DISTILL.CHANNEL_MATCHING
    assert (node.REDUCER, node.WEIGHT, node.REMAINDER) == ("amp", 1.0, "shave")
    assert (recipe.SOLVER.NESTEROV, recipe.MODEL.BACKBONE.FREEZE_AT, recipe.SOLVER.MAX_ITER) == (True, 1, 90000)
    assert not recipe.DISTILL.INIT_FROM_TEACHER.ENABLED
    control.DISTILL.CHANNEL_MATCHING.WEIGHT = 1.0
    assert control.dump() == recipe.dump()


def tame(net: nn.Module, *names: str) -> None:
    """Makes features of a random network as large as those of a trained one: masks must not be 0 or 1 all over."""
    body = net.backbone.bottom_up
    body.stem.conv1.norm.weight.fill_(0.01)
    for block in itertools.chain(body.res2, body.res3, body.res4, body.res5):
        block.conv3.norm.weight.fill_(0.1)


@pytest.mark.parametrize("teacher", TOKEN_LEARNING)
def test_tokens_of_every_teacher_take_a_step(teacher, untrained, monkeypatch, tmp_path):
    cfg = load(ROOT / f"configs/COCO/{teacher}_tokens.yaml")
    learn = cfg.DISTILL.RECEPTIVE_TOKENS.LEARN
    learn.ITERATIONS, learn.PICTURES, learn.WEIGHT_DECAY = 1, 0, 0.0  # decay would move what has no gradient
    torch.manual_seed(1)
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = "random.pth", str(tmp_path)
    monkeypatch.setattr(token_trainer, "load_strictly", tame)
    monkeypatch.setattr(RandomLoader, "records", [], raising=False)
    run = TokenTrainer(cfg)
    before = {name: value.clone() for name, value in run.learner.state_dict().items()}
    run.train()
    assert len(run.learner.taps) == 5
    moved = {name for name, value in run.learner.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in before if name.endswith("tokens")} <= moved
    assert len(TokenFile.load(run.result_file).levels) == 5
    del run
    gc.collect()


@pytest.mark.parametrize("paths", groups().values(), ids=lambda paths: "=".join(map(config_name, paths)))
def test_one_step_and_one_inference(paths, untrained, monkeypatch, tmp_path):
    cfg = load(paths[0])
    cfg.OUTPUT_DIR = str(tmp_path)
    torch.manual_seed(1)
    if is_distillation(cfg):
        teacher = build_model(teacher_config(cfg))
        monkeypatch.setattr(build, "load_teacher", lambda teacher_cfg: (teacher, {}))
        if "ReceptiveTokens" in cfg.DISTILL.METHODS:
            give_tokens(cfg, teacher, tmp_path / "tokens.pth")
    before = build_model(cfg).state_dict()
    torch.manual_seed(1)
    run, losses = one_step(cfg)
    names = {loss.split("/")[1] for loss in losses if loss.startswith("distill/")}
    assert names == (set(cfg.DISTILL.METHODS) if is_distillation(cfg) else set())
    after = run.student.state_dict()
    assert before.keys() == after.keys() and all(torch.isfinite(x).all() for x in after.values())
    assert any(not torch.equal(before[key], after[key]) for key in after)
    (output,) = run.student.eval()([random_input(2)])
    assert output
    del run
    gc.collect()  # trainer and hooks refer to each other, and some of these models are large
