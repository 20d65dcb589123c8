"""The levels of a backbone that a head takes."""

from collections.abc import Sequence
from typing import Any

from d2kd.errors import ConfigError
from detectron2.modeling import Backbone


def levels_of(backbone: Backbone, key: str, names: Sequence[str]) -> list[Any]:
    """Returns the shapes (Detectron2's `ShapeSpec`) of some outputs of a backbone.

    Args:
        backbone: gives them.
        key: the configuration key that names them, in full.
        names: of the outputs.

    Raises:
        ConfigError: it does not give one of them.
    """
    shapes = backbone.output_shape()
    unknown = [name for name in names if name not in shapes]
    if unknown:
        raise ConfigError(
            f"{key} names {', '.join(unknown)}, but the backbone (MODEL.BACKBONE.NAME) gives {', '.join(shapes)}."
        )
    return [shapes[name] for name in names]


def check_group_norm(key: str, norm: str, name: str, level: Any) -> None:
    """
    Args:
        key: the configuration key of the normalization, in full.
        norm: as for Detectron2's `get_norm`.
        name, level: the feature whose channels all layers of the head have, and its shape.

    Raises:
        ConfigError: it is GN, and they are no multiple of its 32 groups.
    """
    if norm == "GN" and level.channels % 32:
        raise ConfigError(
            f"{key} is GN, which needs a multiple of 32 channels; {name} has {level.channels} (MODEL.FPN.OUT_CHANNELS)."
        )
