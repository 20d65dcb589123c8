"""Building the models that configurations name, with a clear error for names that nobody has registered."""

from functools import partial
from typing import Any

from torch import nn

from d2kd.config import config_check, get_key
from d2kd.errors import UserError, require_choice
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_model

from ..padding import Padding


class ArchitectureError(UserError):
    """A configuration names an architecture, backbone or head that is not there."""


def build_network(cfg: CfgNode, where: str) -> nn.Module:
    """Returns the model of Detectron2's `build_model`; an image that its padding would cut is an error.

    Args:
        cfg: of the model.
        where: what the configuration is, for the error.

    Raises:
        ArchitectureError: a name is in no registry, or parts do not fit each other.
    """
    try:
        return _refusing_cut_images(build_model(cfg))
    except UserError:
        raise
    except (AssertionError, ValueError) as error:  # e.g. of a norm whose groups do not divide its channels
        raise ArchitectureError(f"The model of {where} cannot be built: {error or 'its parts do not fit'}.") from error
    except KeyError as error:
        message = str(error.args[0]) if error.args else ""
        if "registry" not in message:
            raise
        raise ArchitectureError(f"In {where}: {message}") from error


def _refusing_cut_images(model: nn.Module) -> nn.Module:
    padding = Padding.of(model)
    if padding.square:
        model.register_forward_pre_hook(partial(_check_images, padding))
    return model


def _check_images(padding: Padding, module: nn.Module, arguments: tuple[Any, ...]) -> None:
    if arguments and isinstance(arguments[0], list):
        padding.require_fit(arguments[0])


@config_check
def check_names(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: architecture or backbone are not registered.
    """
    hint = " If another project has it, import the module that registers it (--import)."
    for key, registry in (("META_ARCHITECTURE", META_ARCH_REGISTRY), ("BACKBONE.NAME", BACKBONE_REGISTRY)):
        require_choice(f"MODEL.{key}", get_key(cfg, f"MODEL.{key}"), sorted(name for name, _ in registry), hint)
