"""Pretrained weights of timm and torchvision, loaded where a training starts."""

import logging
from collections.abc import Mapping

from torch import Tensor, nn

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
    path, module = find_network(model) or ("", None)
    weights = "" if module is None else get_key(cfg, f"{module.NODE}.WEIGHTS")
    if module is None or not weights:
        return set()
    logger.info("%s gets its pretrained weights from %s.WEIGHTS: %s", path, module.NODE, weights)
    return _load(path, module, weights)


def find_network(model: nn.Module) -> tuple[str, TimmBackbone | WholeNetwork] | None:
    """Returns the network of timm or torchvision that a model has, with its path; None where it has none."""
    networks = ((path, m) for path, m in model.named_modules() if isinstance(m, (TimmBackbone, WholeNetwork)))
    return next(networks, None)


def load_bare_network(model: nn.Module, weights: Mapping[str, Tensor]) -> set[str]:
    """Loads weights that have their library's names into the network of that library that a model has.

    Args:
        model: any.
        weights: of the network alone, as `torch.save(network.state_dict(), ...)` has them.

    Returns:
        The names of the parameters and buffers that have these values now; none where the model has no such network, or
        the weights are those of a whole model.

    Raises:
        ConfigError: they do not fit the network.
    """
    found = find_network(model)
    if found is None or any(name in model.state_dict() for name in weights):
        return set()
    stripped = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    if not all(isinstance(tensor, Tensor) for tensor in stripped.values()):
        return set()
    return _load(*found, stripped)


def _load(path: str, module: TimmBackbone | WholeNetwork, weights: str | Mapping[str, Tensor]) -> set[str]:
    left = module.load_pretrained(weights)
    if left:
        logger.warning("Initialized anew, as the weights are for other classes: %s", ", ".join(left))
    return {f"{path}.net.{name}" for name in module.net.state_dict() if name not in left}
