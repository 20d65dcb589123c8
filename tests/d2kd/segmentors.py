"""Small segmentors and batches for the tests of segmentation."""

from typing import Any

import torch
from models import batch

#: DeepLabV3 in mmsegmentation's form on a narrow dilated ResNet-18, with an auxiliary head.
SEGMENTOR: dict[str, Any] = {
    "MODEL.META_ARCHITECTURE": "Segmentor",
    "MODEL.BACKBONE.NAME": "build_dilated_resnet_backbone",
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.STEM_TYPE": "deeplab",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 4,
    "MODEL.RESNETS.RES4_DILATION": 2,
    "MODEL.RESNETS.RES5_DILATION": 4,
    "MODEL.RESNETS.OUT_FEATURES": ["res4", "res5"],
    "MODEL.SEM_SEG_HEAD.NAME": "ASPPHead",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["res5"],
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 4,
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": 255,
    "MODEL.SEM_SEG_HEAD.NORM": "BN",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 8,
    "MODEL.SEM_SEG_HEAD.ASPP_CHANNELS": 8,
    "MODEL.SEM_SEG_HEAD.ASPP_FORM": "bottleneck",
    "MODEL.SEM_SEG_HEAD.LOSS_AVERAGE": "all",
    "MODEL.SEM_SEG_HEAD.AUX_FEATURE": "res4",
    "MODEL.SEM_SEG_HEAD.AUX_CHANNELS": 8,
}
PSP = {**SEGMENTOR, "MODEL.SEM_SEG_HEAD.NAME": "PSPHead"}


def labelled(sizes: list[Any] = ((64, 96), (64, 96)), classes: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Random images of (height, width) with random labels, some of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for x in batch(sizes, seed):
        labels = torch.randint(0, classes, x["image"].shape[1:], generator=generator)
        labels[:7] = 255
        inputs.append({**x, "sem_seg": labels})
    return inputs
