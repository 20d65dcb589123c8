"""Building the models that configurations name, with a clear error for names that nobody has registered."""

from torch import nn

from d2kd.errors import UserError
from detectron2.config import CfgNode
from detectron2.modeling import build_model


class ArchitectureError(UserError):
    """A configuration names an architecture, backbone or head that is not there."""


def build_network(cfg: CfgNode, where: str) -> nn.Module:
    """Returns the model of Detectron2's `build_model`.

    Args:
        cfg: of the model.
        where: what the configuration is, for the error.

    Raises:
        ArchitectureError: a name is in no registry.
    """
    try:
        return build_model(cfg)
    except KeyError as error:
        message = str(error.args[0]) if error.args else ""
        if "registry" not in message:
            raise
        raise ArchitectureError(f"In {where}: {message}") from error
