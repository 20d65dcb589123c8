"""Small models and batches for the tests of d2kd."""

from typing import Any

import torch
from torch import nn

import d2kd  # noqa: F401  (makes `detectron2` importable, also in processes that are spawned)
from d2kd.config import add_distill_config
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

NARROW = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
}
RETINANET = {
    "MODEL.META_ARCHITECTURE": "RetinaNet",
    "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.OUT_CHANNELS": 8,
    "MODEL.RETINANET.NUM_CLASSES": 3,
    "MODEL.RETINANET.NUM_CONVS": 1,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [64], [128], [256]],
}
FASTER_RCNN = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.OUT_CHANNELS": 8,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [64], [128], [256]],
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 100,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 100,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 50,
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_HEADS.NUM_CLASSES": 3,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 3,
}


def config(base: dict[str, Any] = RETINANET, **changes: Any) -> CfgNode:
    """A narrow model on the CPU; `changes` are keys with '__' for '.'."""
    cfg = get_cfg()
    add_distill_config(cfg)
    everything = {
        "MODEL.DEVICE": "cpu",
        "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RESNETS.NORM": "BN",
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "SEED": 1,
        **NARROW,
        **base,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    cfg.merge_from_list([x for pair in everything.items() for x in pair])
    return cfg


def model(cfg: CfgNode | None = None, seed: int = 0) -> nn.Module:
    """A model with weights that depend on the seed alone."""
    torch.manual_seed(seed)
    return build_model(cfg if cfg is not None else config())


def batch(sizes: list[Any] = ((96, 128), (128, 80)), seed: int = 0) -> list[dict[str, Any]]:
    """Random images of (height, width) with one box each, class 1."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for h, w in sizes:
        truth = Instances(
            (h, w), gt_boxes=Boxes(torch.tensor([[10.0, 12.0, 50.0, 60.0]])), gt_classes=torch.tensor([1])
        )
        image = torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=generator)
        inputs.append({"image": image, "height": h, "width": w, "instances": truth})
    return inputs


def write_teacher(directory: Any, cfg: CfgNode | None = None, seed: int = 7) -> dict[str, Any]:
    """Writes a teacher's YAML and weights; returns the configuration keys that name them."""
    cfg = cfg if cfg is not None else config()
    yaml, weights = directory / "teacher.yaml", directory / "teacher.pth"
    yaml.write_text(cfg.dump())
    torch.save({"model": model(cfg, seed).state_dict()}, weights)
    return {"DISTILL__TEACHER__CONFIG_FILE": str(yaml), "DISTILL__TEACHER__WEIGHTS": str(weights)}
