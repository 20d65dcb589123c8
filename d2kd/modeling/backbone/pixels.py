"""The pixels that networks of timm and torchvision were trained with, and how a configuration gets them."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

from d2kd.config import config_fill, get_key
from detectron2.config import CfgNode

from .timm_networks import TIMM_BACKBONES, pretrained_config

logger = logging.getLogger(__name__)

#: Of ImageNet, which torchvision's classifiers are trained with.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Pixels(NamedTuple):
    """Mean and deviation of a network's pixels, 0 to 255, in RGB order."""

    mean: list[float]
    std: list[float]


def pixels_of(cfg: CfgNode) -> Pixels | None:
    """Returns what the pretrained weights of a configuration's network expect; None for networks of Detectron2."""
    mean: Sequence[float]
    std: Sequence[float]
    mean, std = _IMAGENET
    if cfg.MODEL.BACKBONE.NAME in TIMM_BACKBONES:
        known = pretrained_config(cfg.MODEL.TIMM.NAME)
        mean, std = known.get("mean", mean), known.get("std", std)
    elif cfg.MODEL.BACKBONE.NAME != "build_torchvision_network":
        return None
    return Pixels([round(255 * x, 3) for x in mean], [round(255 * x, 3) for x in std])


@config_fill
def with_data_config(cfg: CfgNode) -> None:
    """Sets MODEL.PIXEL_MEAN, MODEL.PIXEL_STD and INPUT.FORMAT to those of the network's library.

    `MODEL.TIMM.DATA_CONFIG` False, or a network of Detectron2, leaves them as they are.
    """
    pixels = pixels_of(cfg) if get_key(cfg, "MODEL.TIMM.DATA_CONFIG") else None
    if pixels is not None:
        cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT = pixels.mean, pixels.std, "RGB"


def log_pixels(cfg: CfgNode) -> None:
    """Logs the pixels that a network of timm or torchvision gets; a warning where they are not those it expects."""
    pixels, given = pixels_of(cfg), Pixels(list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD))
    if pixels is None:
        return
    name = cfg.MODEL.TIMM.NAME if cfg.MODEL.BACKBONE.NAME in TIMM_BACKBONES else cfg.MODEL.TORCHVISION.NAME
    text = f"Pixels of {name}: {cfg.INPUT.FORMAT}, mean {given.mean}, deviation {given.std}"
    if pixels == given and cfg.INPUT.FORMAT == "RGB":
        logger.info("%s, as its library has them", text)
    else:
        logger.warning("%s; pretrained weights expect RGB, %s, %s", text, *pixels)
