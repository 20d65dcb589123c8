"""The static description of a feature map that modules exchange while a model is built."""

from dataclasses import dataclass


@dataclass
class ShapeSpec:
    """Channels, spatial size and stride (input pixels per cell) of a feature map; None if not known."""

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None
