"""Pretrained weights of timm and torchvision, loaded where a training starts."""

import logging

from torch import nn

from d2kd.config import get_key
from detectron2.config import CfgNode

from .timm_backbone import TimmBackbone
from .whole_networks import WholeNetwork

logger = logging.getLogger(__name__)


def load_pretrained_network(cfg: CfgNode, model: nn.Module) -> set[str]:
    """Loads `MODEL.TIMM.WEIGHTS` or `MODEL.TORCHVISION.WEIGHTS` into the model's backbone, where it has such a network.

    Returns:
        The names of the parameters and buffers that have pretrained values now.

    Raises:
        ConfigError: they cannot be loaded.
    """
    for path, module in model.named_modules():
        if not isinstance(module, (TimmBackbone, WholeNetwork)):
            continue
        weights = get_key(cfg, f"{module.NODE}.WEIGHTS")
        if not weights:
            continue
        left = module.load_pretrained(weights)
        logger.info("%s gets its pretrained weights from %s.WEIGHTS: %s", path, module.NODE, weights)
        if left:
            logger.warning("Initialized anew, as the weights are for other classes: %s", ", ".join(left))
        return {f"{path}.net.{name}" for name in module.net.state_dict() if name not in left}
    return set()
