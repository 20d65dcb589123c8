"""The registry of whole models, and building one from a config."""

import torch
from torch import nn

from d2lite.config import CfgNode
from d2lite.utils.registry import Registry

META_ARCH_REGISTRY = Registry("META_ARCH")
META_ARCH_REGISTRY.__doc__ = """
Whole models, called as `cls(cfg)`. They take a list of dataset dicts; in training mode they return a dict of
losses, otherwise a list with one dict of predictions per image.
"""


def build_model(cfg: CfgNode) -> nn.Module:
    """Builds the model named by `cfg.MODEL.META_ARCHITECTURE` on `cfg.MODEL.DEVICE`. Loads no weights."""
    model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    return model.to(torch.device(cfg.MODEL.DEVICE))
