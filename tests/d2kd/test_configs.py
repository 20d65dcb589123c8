"""Every YAML in configs/ loads, builds its student and its teacher, and runs one training step and one inference."""

import gc
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest
import torch
from runs import ROOT
from torch import nn

from d2kd.distillers import DISTILLERS
from d2kd.distillers.token_file import LearnedLevel, TokenFile, weights_checksum
from d2kd.engine import DistillTrainer, load_config, trainer
from d2kd.layers.tokens import Tokens
from d2kd.modeling import build, is_distillation, teacher_config
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
#: Small images for the models that want a size, in pixels; a probe of the taps has 128.
SMALL = ["MODEL.VIT.IMG_SIZE", 128, "MODEL.VIT.SQUARE_PAD", 128]


def load(path: Path) -> CfgNode:
    """A configuration for one step on the CPU, otherwise as it is."""
    cfg = load_config(str(path), ["MODEL.DEVICE", "cpu", *SMALL])
    cfg.DISTILL.TEACHER.OPTS = [*cfg.DISTILL.TEACHER.OPTS, *SMALL]
    cfg.DISTILL.TEACHER.EVAL_FIRST = False
    cfg.DATASETS.TEST = ()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS = 1, (), 0
    cfg.SOLVER.AMP.PRECISION = "bfloat16"
    cfg.SOLVER.IMS_PER_BATCH = 1024  # by this, a tracking pass has but a few of the loader's small batches
    cfg.SEED = 1
    return cfg


def what_runs(path: Path) -> str:
    """Two configurations with the same text here differ in schedule, data and names of files only."""
    cfg = load(path)
    models = [cfg.MODEL, teacher_config(cfg).MODEL] if is_distillation(cfg) else [cfg.MODEL]
    for model in models:
        model.WEIGHTS = ""
    cfg.DISTILL.TEACHER.CONFIG_FILE = cfg.DISTILL.TEACHER.WEIGHTS = ""
    solver = cfg.SOLVER
    rest = [cfg.DISTILL, cfg.INPUT.FORMAT, solver.OPTIMIZER, solver.CLIP_GRADIENTS, solver.AMP, solver.ACCUMULATE]
    return "".join(map(str, [*models, *rest, solver.EMA]))


def groups() -> Dict[str, List[Path]]:
    """Configurations by what runs, in groups that are tested by their first one."""
    found: Dict[str, List[Path]] = {}
    for path in CONFIGS:
        found.setdefault(what_runs(path), []).append(path)
    return found


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs").with_suffix(""))


def random_input(seed: int) -> Dict[str, Any]:
    """An image of 64 x 64 pixels with whatever a model may learn from: boxes, masks, classes per pixel."""
    generator = torch.Generator().manual_seed(seed)
    truth = Instances((64, 64))
    truth.gt_boxes = Boxes(torch.tensor([[6.0, 8.0, 30.0, 40.0], [20.0, 4.0, 60.0, 50.0]]))
    truth.gt_classes = torch.tensor([0, 1])
    truth.gt_masks = BitMasks(torch.zeros(2, 64, 64, dtype=torch.bool))
    for mask, (x0, y0, x1, y1) in zip(truth.gt_masks.tensor, truth.gt_boxes.tensor.int().tolist()):
        mask[y0:y1, x0:x1] = True
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=generator)
    per_pixel = torch.randint(0, 2, (64, 64), generator=generator)
    return {"image": image, "height": 64, "width": 64, "instances": truth, "sem_seg": per_pixel}


class RandomLoader:
    """Batches of two random images."""

    seed, start = 1, 0

    def __iter__(self) -> Iterator[List[Dict[str, Any]]]:
        while True:
            yield [random_input(0), random_input(1)]


def give_tokens(cfg: CfgNode, teacher: nn.Module, path: Path) -> None:
    """Writes random receptive tokens for every feature of the teacher's backbone."""
    shapes = teacher.backbone.output_shape()
    levels = {tap: LearnedLevel(Tokens(torch.randn(2, s.channels), None, None), 0.0) for tap, s in shapes.items()}
    TokenFile(weights_checksum(teacher.state_dict()), levels, 1).save(str(path))
    cfg.DISTILL.RECEPTIVE_TOKENS.FILE = str(path)


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CfgNode:
    """Makes trainers run on random images, with random teachers, and write no checkpoints."""
    monkeypatch.setattr(trainer, "check_datasets", lambda cfg: None)
    monkeypatch.setattr(trainer, "check_class_counts", lambda cfg: None)
    monkeypatch.setattr(DistillTrainer, "build_train_loader", staticmethod(lambda cfg: RandomLoader()))
    monkeypatch.setattr(DistillTrainer, "save", lambda self, name: None)
    monkeypatch.setattr(DistillTrainer, "build_writers", lambda self: [])


def one_step(cfg: CfgNode) -> Tuple[DistillTrainer, Dict[str, float]]:
    """A trainer after one step, and its losses."""
    run = DistillTrainer(cfg)
    run.train()
    return run, {k: v for k, (v, _) in run.storage.latest().items() if "loss" in k or k.startswith("distill/")}


@pytest.mark.parametrize("path", CONFIGS, ids=name)
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


def test_recipes_of_released_settings_keep_to_them():
    recipes = {path.stem: load_config(str(path)) for path in (ROOT / "configs/COCO").glob("*.yaml")}
    for stem, cfg in recipes.items():
        if "ReceptiveTokens" in stem:  # one scale; FCOS two
            assert list(cfg.INPUT.MIN_SIZE_TRAIN) == [*([640] if "fcos" in stem else []), 800]
        if "ChannelMatching" in stem:  # channels are assigned before the first step, by networks in evaluation mode
            assert cfg.DISTILL.CHANNEL_MATCHING.TRACKING == "pass"


@pytest.mark.parametrize("paths", groups().values(), ids=lambda paths: "=".join(map(name, paths)))
def test_one_step_and_one_inference(paths, untrained, monkeypatch, tmp_path):
    cfg = load(paths[0])
    cfg.OUTPUT_DIR = str(tmp_path)
    torch.manual_seed(1)
    if is_distillation(cfg):
        teacher = build_model(teacher_config(cfg))
        monkeypatch.setattr(build, "load_teacher", lambda teacher_cfg: teacher)
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
