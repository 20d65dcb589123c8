"""A training step of a recipe for PhotoDigits with random weights on a random batch: no data, no trained teacher."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import random_batch

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.engine import load_config
from d2kd.engine.optimizer import build_optimizer
from d2kd.engine.train_step import TrainStep, mixed_precision
from d2kd.modeling import build_distilled_model, is_distillation, load_teacher, num_classes, teacher_config
from d2kd.token_learning import TokenLearner
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage


def recipe_step(
    recipe: Path, folder: Path, device: str, precision: str = "float32", options: Sequence[Any] = ()
) -> Callable[[], dict[str, float]]:
    """Returns a function that makes a step, and returns the losses.

    Args:
        recipe: a YAML of configs/PhotoDigits.
        folder: for the weights of a teacher.
        device: of the model.
        precision: "float32", "bfloat16" or "float16".
        options: changes to the configuration, [key, value, ...].
    """
    cfg = recipe_config(recipe, folder, device)
    cfg.merge_from_list(list(options))
    if precision != "float32":
        cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.PRECISION = True, precision
    torch.manual_seed(0)  # the same student whether its teacher had to be made or not
    model = (build_distilled_model(cfg) if is_distillation(cfg) else build_model(cfg)).train()
    batch = batch_for(cfg)
    step = TrainStep(model, _forever(batch), build_optimizer(cfg, model), precision=mixed_precision(cfg))
    step.iter = 0
    storage = EventStorage()

    def call() -> dict[str, float]:
        with storage:
            step.run_step()
            storage.step()
        step.iter += 1
        return {name: value for name, (value, _) in storage.latest().items() if "loss" in name or "distill/" in name}

    return call


def recipe_config(recipe: Path, folder: Path, device: str) -> CfgNode:
    """The recipe's configuration, with a teacher of random weights where it has one."""
    plain = ["MODEL.WEIGHTS", ""]
    cfg = load_config(str(recipe), [*plain, "MODEL.DEVICE", "cpu"])
    if is_distillation(cfg):
        weights = folder / f"{Path(cfg.DISTILL.TEACHER.CONFIG_FILE).stem}.pth"
        cfg.DISTILL.TEACHER.WEIGHTS = str(weights)
        if not weights.is_file():
            torch.manual_seed(1)
            torch.save({"model": build_model(teacher_config(cfg)).state_dict()}, weights)
        if "ReceptiveTokens" in cfg.DISTILL.METHODS:
            cfg.DISTILL.RECEPTIVE_TOKENS.FILE = str(folder / "tokens.pth")
            cfg.DISTILL.RECEPTIVE_TOKENS.WARMUP_ITERS = 0  # with the student's masks, too
            torch.manual_seed(1)
            learner = TokenLearner(load_teacher(teacher_config(cfg))[0])
            tokens = learner.export_tokens(dict.fromkeys(learner.taps, 0.0), 0)
            tokens.save(cfg.DISTILL.RECEPTIVE_TOKENS.FILE)
        if "ChannelMatching" in cfg.DISTILL.METHODS:
            cfg.DISTILL.CHANNEL_MATCHING.TRACK_IMAGES = 2  # channels are assigned after the first step
    cfg.MODEL.DEVICE = device
    return cfg


def batch_for(cfg: CfgNode) -> list[dict[str, Any]]:
    """Two random images with what the model learns from; more for a classifier."""
    if cfg.MODEL.META_ARCHITECTURE != "ImageClassifier":
        return random_batch(128, 2, num_classes(cfg)[1], cfg.MODEL.MASK_ON)
    side = cfg.INPUT.CLASSIFICATION.SIZE
    shape = (3, side, side)
    images = [torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(8)]
    return [{"image": image, "label": i % 10, "height": side, "width": side} for i, image in enumerate(images)]


def _forever(batch: list[dict[str, Any]]) -> Any:
    while True:
        yield batch
