"""Rules for Detectron2's own keys: type and default are the runtime's; here stands what else a value must be.

They hold for every configuration that trains there. A key that the runtime lacks is left out; one without a rule has
its type only.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from d2kd.errors import ConfigError
from d2kd.settings import ASCENDING, NOT_EMPTY, SORTED, Rule, Setting, length
from detectron2.config import CfgNode

#: Normalizations by name; "" is none.
NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")

#: A declaration without the default, which the runtime has.
allow = partial(Setting, None)

_ONE_OR_MORE = allow(at_least=1)
_NOT_NEGATIVE = allow(at_least=0)
_POSITIVE = allow(above=0)
_SHARE = allow(at_least=0, at_most=1)
_NAMED = allow(rule=NOT_EMPTY)
_NAMES = allow(rule=Rule("must not hold an empty name", all))
#: Negative: everything is a detection, also of an untrained model.
_SCORE = allow(at_least=-1, below=1)
_OVERLAP = allow(above=0, at_most=1)
_OVERLAPS = allow(at_least=0, at_most=1, rule=SORTED)
_LABELS = allow(choices=(-1, 0, 1))
_NORM = allow(choices=NORMS)
_BOX_LOSS = allow(choices=("smooth_l1", "giou", "diou", "ciou"))
_BOX_WEIGHTS = allow(above=0, rule=length(4, 5))  # 5 of rotated boxes
_POOLER = allow(choices=("ROIAlignV2", "ROIAlign", "ROIPool", "ROIAlignRotated"))
_SIDES = allow(at_least=1, rule=NOT_EMPTY)
_ANCHORS = allow(
    above=0,
    items=float,
    rule=Rule(
        "must be a list for each level, or one for all",
        lambda levels: [] not in levels and len({isinstance(level, list) for level in levels}) == 1,
    ),
)

#: Channels of an image, by INPUT.FORMAT.
CHANNELS = {"BGR": 3, "RGB": 3, "YUV-BT.601": 3, "YCbCr": 3, "LAB": 3, "HSV": 3, "L": 1, "RGBA": 4, "CMYK": 4}

#: Backbones that are ResNets as Detectron2 has them.
RESNETS = (
    "build_resnet_backbone",
    "build_resnet_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone",
    "build_retinanet_resnet_fpn_last_norm_backbone",
    "build_fcos_resnet_fpn_backbone",
    "build_reppoints_resnet_fpn_backbone",
)
#: Nodes of the heads that have anchors, by architecture.
ANCHORED = {"RetinaNet": "RETINANET", "GeneralizedRCNN": "RPN", "ProposalNetwork": "RPN", "PanopticFPN": "RPN"}

_RUN = {
    "OUTPUT_DIR": _NAMED,
    "SEED": allow(at_least=-1, below=2**31),
    "VIS_PERIOD": _NOT_NEGATIVE,
    "FLOAT32_PRECISION": allow(choices=("", "highest", "high", "medium")),
    "INPUT.FORMAT": allow(choices=tuple(CHANNELS)),
    "INPUT.MIN_SIZE_TRAIN": _SIDES,
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": allow(choices=("choice", "range")),
    "INPUT.MAX_SIZE_TRAIN": _ONE_OR_MORE,
    "INPUT.MIN_SIZE_TEST": _NOT_NEGATIVE,  # 0 keeps images as they are
    "INPUT.MAX_SIZE_TEST": _ONE_OR_MORE,
    "INPUT.RANDOM_FLIP": allow(choices=("horizontal", "vertical", "none")),
    "INPUT.CROP.TYPE": allow(choices=("relative", "relative_range", "absolute", "absolute_range")),
    "INPUT.CROP.SIZE": allow(above=0, rule=length(2)),
    "INPUT.MASK_FORMAT": allow(choices=("polygon", "bitmask")),
    "DATASETS.TRAIN": _NAMES,
    "DATASETS.TEST": _NAMES,
    "DATASETS.PROPOSAL_FILES_TRAIN": _NAMES,
    "DATASETS.PROPOSAL_FILES_TEST": _NAMES,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": _ONE_OR_MORE,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": _ONE_OR_MORE,
    "DATALOADER.NUM_WORKERS": _NOT_NEGATIVE,
    "DATALOADER.SAMPLER_TRAIN": allow(
        choices=("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler", "RepeatAugSampler")
    ),
    "DATALOADER.REPEAT_THRESHOLD": _SHARE,
    "TEST.EVAL_PERIOD": _NOT_NEGATIVE,
    "TEST.DETECTIONS_PER_IMAGE": _ONE_OR_MORE,
    "TEST.AUG.MIN_SIZES": _SIDES,
    "TEST.AUG.MAX_SIZE": _ONE_OR_MORE,
    "TEST.PRECISE_BN.NUM_ITER": _ONE_OR_MORE,
}

_SOLVER = {
    "SOLVER.IMS_PER_BATCH": _ONE_OR_MORE,
    "SOLVER.MAX_ITER": _ONE_OR_MORE,  # the schedule divides by it
    "SOLVER.BASE_LR": _POSITIVE,
    "SOLVER.BASE_LR_END": _NOT_NEGATIVE,
    "SOLVER.MOMENTUM": allow(at_least=0, below=1),
    "SOLVER.WEIGHT_DECAY": _NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY_NORM": _NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY_BIAS": allow(at_least=0, items=float),
    "SOLVER.BIAS_LR_FACTOR": _NOT_NEGATIVE,
    "SOLVER.LR_SCHEDULER_NAME": allow(
        choices=("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR", "WarmupPolyLR")
    ),
    "SOLVER.STEPS": allow(at_least=1, rule=ASCENDING),
    "SOLVER.GAMMA": _POSITIVE,
    "SOLVER.NUM_DECAYS": _ONE_OR_MORE,
    "SOLVER.WARMUP_FACTOR": _SHARE,
    "SOLVER.WARMUP_ITERS": _NOT_NEGATIVE,
    "SOLVER.WARMUP_METHOD": allow(choices=("linear", "constant")),
    "SOLVER.CHECKPOINT_PERIOD": _ONE_OR_MORE,
    "SOLVER.REFERENCE_WORLD_SIZE": _NOT_NEGATIVE,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": allow(choices=("value", "norm", "full_model")),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": _POSITIVE,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": allow(above=0, infinite=True),
}

_BACKBONE = {
    "MODEL.DEVICE": allow(
        rule=Rule(
            "must be cuda, cpu, or one GPU, such as cuda:1",
            lambda name: bool(re.fullmatch(r"cpu|cuda(:\d{1,2})?", name)),
        )
    ),
    "MODEL.META_ARCHITECTURE": _NAMED,
    "MODEL.WEIGHTS": allow(path=True),
    "MODEL.PIXEL_MEAN": allow(rule=NOT_EMPTY),
    "MODEL.PIXEL_STD": allow(above=0, rule=NOT_EMPTY),
    "MODEL.BACKBONE.NAME": _NAMED,
    "MODEL.BACKBONE.FREEZE_AT": allow(at_least=0, at_most=5),
    "MODEL.RESNETS.DEPTH": allow(choices=(18, 34, 50, 101, 152)),
    "MODEL.RESNETS.OUT_FEATURES": allow(rule=NOT_EMPTY),
    "MODEL.RESNETS.NUM_GROUPS": _ONE_OR_MORE,
    "MODEL.RESNETS.WIDTH_PER_GROUP": _ONE_OR_MORE,
    "MODEL.RESNETS.NORM": _NORM,
    "MODEL.RESNETS.RES5_DILATION": allow(choices=(1, 2, 4)),
    "MODEL.RESNETS.RES2_OUT_CHANNELS": _ONE_OR_MORE,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": _ONE_OR_MORE,
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": allow(rule=length(4)),
    "MODEL.RESNETS.DEFORM_NUM_GROUPS": _ONE_OR_MORE,
    "MODEL.FPN.IN_FEATURES": _NAMES,
    "MODEL.FPN.OUT_CHANNELS": _ONE_OR_MORE,
    "MODEL.FPN.NORM": _NORM,
    "MODEL.FPN.FUSE_TYPE": allow(choices=("sum", "avg")),
    "MODEL.ANCHOR_GENERATOR.NAME": _NAMED,
    "MODEL.ANCHOR_GENERATOR.SIZES": _ANCHORS,
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": _ANCHORS,
    "MODEL.ANCHOR_GENERATOR.ANGLES": allow(items=float),
    "MODEL.ANCHOR_GENERATOR.OFFSET": allow(at_least=0, below=1),
}

_HEADS = {
    "MODEL.PROPOSAL_GENERATOR.NAME": _NAMED,
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": _NOT_NEGATIVE,
    "MODEL.RPN.HEAD_NAME": _NAMED,
    "MODEL.RPN.IN_FEATURES": allow(rule=NOT_EMPTY),
    "MODEL.RPN.BOUNDARY_THRESH": allow(at_least=-1),
    "MODEL.RPN.CONV_DIMS": allow(at_least=-1, rule=NOT_EMPTY),
    "MODEL.RPN.IOU_THRESHOLDS": _OVERLAPS,
    "MODEL.RPN.IOU_LABELS": _LABELS,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": _ONE_OR_MORE,
    "MODEL.RPN.POSITIVE_FRACTION": _SHARE,
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
    "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": _NOT_NEGATIVE,
    "MODEL.RPN.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.RPN.SMOOTH_L1_BETA": _NOT_NEGATIVE,
    "MODEL.RPN.LOSS_WEIGHT": _NOT_NEGATIVE,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": _ONE_OR_MORE,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": _ONE_OR_MORE,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": _ONE_OR_MORE,
    "MODEL.RPN.POST_NMS_TOPK_TEST": _ONE_OR_MORE,
    "MODEL.RPN.NMS_THRESH": _OVERLAP,
    "MODEL.ROI_HEADS.NAME": _NAMED,
    "MODEL.ROI_HEADS.NUM_CLASSES": _ONE_OR_MORE,
    "MODEL.ROI_HEADS.IN_FEATURES": allow(rule=NOT_EMPTY),
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": _OVERLAPS,
    "MODEL.ROI_HEADS.IOU_LABELS": _LABELS,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": _ONE_OR_MORE,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": _SHARE,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": _SCORE,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": _OVERLAP,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": _NOT_NEGATIVE,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": _NOT_NEGATIVE,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": _ONE_OR_MORE,
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": _NOT_NEGATIVE,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": _POOLER,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": _NOT_NEGATIVE,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": _ONE_OR_MORE,
    "MODEL.ROI_BOX_HEAD.NUM_FC": _NOT_NEGATIVE,
    "MODEL.ROI_BOX_HEAD.FC_DIM": _ONE_OR_MORE,
    "MODEL.ROI_BOX_HEAD.NORM": _NORM,
    "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES": _ONE_OR_MORE,
    "MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER": _NOT_NEGATIVE,
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": _OVERLAPS,
    "MODEL.ROI_MASK_HEAD.NAME": _NAMED,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": _ONE_OR_MORE,
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": _NOT_NEGATIVE,
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": _POOLER,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": _NOT_NEGATIVE,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": _ONE_OR_MORE,
    "MODEL.ROI_MASK_HEAD.NORM": _NORM,
    "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": _NOT_NEGATIVE,
    "MODEL.RETINANET.NUM_CLASSES": _ONE_OR_MORE,
    "MODEL.RETINANET.IN_FEATURES": allow(rule=NOT_EMPTY),
    "MODEL.RETINANET.NUM_CONVS": _NOT_NEGATIVE,
    "MODEL.RETINANET.NORM": _NORM,
    "MODEL.RETINANET.IOU_THRESHOLDS": _OVERLAPS,
    "MODEL.RETINANET.IOU_LABELS": _LABELS,
    "MODEL.RETINANET.PRIOR_PROB": allow(above=0, below=1),
    "MODEL.RETINANET.FOCAL_LOSS_ALPHA": allow(at_most=1),  # negative: both sides weigh the same
    "MODEL.RETINANET.FOCAL_LOSS_GAMMA": _NOT_NEGATIVE,
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": _NOT_NEGATIVE,
    "MODEL.RETINANET.SCORE_THRESH_TEST": _SCORE,
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": _ONE_OR_MORE,
    "MODEL.RETINANET.NMS_THRESH_TEST": _OVERLAP,
    "MODEL.SEM_SEG_HEAD.NAME": _NAMED,
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": allow(rule=NOT_EMPTY),
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": _ONE_OR_MORE,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": _ONE_OR_MORE,
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": _ONE_OR_MORE,
    "MODEL.SEM_SEG_HEAD.NORM": _NORM,
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": _NOT_NEGATIVE,
    "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT": _NOT_NEGATIVE,
    "MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH": _SHARE,
    "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT": _NOT_NEGATIVE,
    "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH": _SHARE,
}

DETECTRON2_KEYS: dict[str, Setting] = {**_RUN, **_SOLVER, **_BACKBONE, **_HEADS}


def with_types(defaults: Mapping[str, Any]) -> Iterator[tuple[str, Setting]]:
    """Yields the declaration of every key of the runtime, given their defaults; lists without a rule hold anything."""
    for key, default in defaults.items():
        if key in DETECTRON2_KEYS:
            yield key, replace(DETECTRON2_KEYS[key], default=default)
        elif default is not None:
            yield key, Setting(default, items=object if isinstance(default, (list, tuple)) else None)


def check_together(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: values that do not go together, in a configuration whose values are right by themselves.
    """
    _check_images(cfg)
    solver = cfg.SOLVER
    last_lr = solver.get("BASE_LR_END", 0.0)
    fits = solver.LR_SCHEDULER_NAME not in ("WarmupCosineLR", "WarmupPolyLR") or last_lr <= solver.BASE_LR
    _require(fits, "SOLVER.BASE_LR_END", last_lr, f"be at most SOLVER.BASE_LR, {solver.BASE_LR}")
    _check_backbone(cfg.MODEL)
    _check_heads(cfg.MODEL)


def _check_images(cfg: CfgNode) -> None:
    images, crop = cfg.INPUT, cfg.INPUT.CROP
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        numbers, channels = cfg.MODEL[key], CHANNELS[images.FORMAT]
        fits = len(numbers) == channels
        _require(fits, f"MODEL.{key}", numbers, f"have {channels} numbers, as INPUT.FORMAT is {images.FORMAT}")
    sides = images.MIN_SIZE_TRAIN
    fits = images.MIN_SIZE_TRAIN_SAMPLING == "choice" or len(sides) == 2
    _require(fits, "INPUT.MIN_SIZE_TRAIN", sides, "be two numbers with INPUT.MIN_SIZE_TRAIN_SAMPLING range")
    fits = not crop.ENABLED or not crop.TYPE.startswith("relative") or max(crop.SIZE) <= 1
    _require(fits, "INPUT.CROP.SIZE", crop.SIZE, f"be at most 1 with INPUT.CROP.TYPE {crop.TYPE}")


def _check_backbone(model: CfgNode) -> None:
    if model.BACKBONE.NAME in RESNETS:
        dilation = model.RESNETS.RES5_DILATION
        _require(dilation <= 2, "MODEL.RESNETS.RES5_DILATION", dilation, "be 1 or 2, as res4 is not dilated")
    if model.BACKBONE.NAME in RESNETS and model.RESNETS.DEPTH < 50:
        for key, needed in (("RES2_OUT_CHANNELS", 64), ("NUM_GROUPS", 1), ("RES5_DILATION", 1)):
            fits = model.RESNETS[key] == needed
            _require(fits, f"MODEL.RESNETS.{key}", model.RESNETS[key], f"be {needed} with DEPTH {model.RESNETS.DEPTH}")
    for node, key in (("FPN", "OUT_CHANNELS"), ("ROI_BOX_HEAD", "CONV_DIM"), ("ROI_MASK_HEAD", "CONV_DIM")):
        fits = model[node].NORM != "GN" or model[node][key] % 32 == 0
        _require(fits, f"MODEL.{node}.{key}", model[node][key], "be a multiple of 32 with NORM GN")


def _check_heads(model: CfgNode) -> None:
    for node in ("RPN", "ROI_HEADS", "RETINANET"):
        labels, thresholds = model[node].IOU_LABELS, model[node].IOU_THRESHOLDS
        fits = len(labels) == len(thresholds) + 1
        _require(fits, f"MODEL.{node}.IOU_LABELS", labels, f"have one more than IOU_THRESHOLDS, {thresholds}")
    stages = model.ROI_BOX_CASCADE_HEAD
    fits = len(stages.BBOX_REG_WEIGHTS) == len(stages.IOUS)
    _require(fits, "MODEL.ROI_BOX_CASCADE_HEAD.IOUS", stages.IOUS, "be as many as BBOX_REG_WEIGHTS")
    node = ANCHORED.get(model.META_ARCHITECTURE, "")
    if node and (node == "RETINANET" or model.PROPOSAL_GENERATOR.NAME == "RPN"):
        levels = len(model[node].IN_FEATURES)
        for key in ("SIZES", "ASPECT_RATIOS"):
            value = model.ANCHOR_GENERATOR[key]
            fits = not isinstance(value[0], (list, tuple)) or len(value) in (1, levels)
            words = f"have a list for each of {node}.IN_FEATURES, {levels}, or one for all"
            _require(fits, f"MODEL.ANCHOR_GENERATOR.{key}", value, words)


def _require(holds: bool, key: str, value: Any, words: str) -> None:
    if not holds:
        raise ConfigError(f"{key} is {value!r}; it must {words}.")
