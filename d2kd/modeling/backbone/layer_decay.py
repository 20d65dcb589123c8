"""Learning rates that fall from layer to layer towards the input (arXiv 2106.08254), for `SOLVER.LAYER_DECAY`."""

from collections.abc import Callable
from typing import Any

from torch import nn

from detectron2.config import CfgNode
from detectron2.modeling.backbone.vit import ViT, get_vit_lr_decay_rate


def layer_decay_factors(cfg: CfgNode, model: nn.Module) -> Callable[[str], float] | None:
    """Returns the factor on the learning rate of a parameter of the model, by its name; None where no layers are known.

    It is `SOLVER.LAYER_DECAY` to the power of the layers that lie behind the parameter's; 1 for what is not in the
    backbone.
    """
    for path, module in model.named_modules():
        count: Any = getattr(module, "layers_to_the_end", None)  # of a network of timm
        if count is not None:
            layers = {f"{path}.{name}": behind for name, behind in count().items()}
            return lambda name: float(cfg.SOLVER.LAYER_DECAY ** layers.get(name, 0))
        if isinstance(module, ViT):
            depth = len(module.blocks)
            return lambda name: get_vit_lr_decay_rate(name.removeprefix("student."), cfg.SOLVER.LAYER_DECAY, depth)
    return None
