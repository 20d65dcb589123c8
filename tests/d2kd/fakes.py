"""A detector of a few layers, for tests of taps and pairing: what fails can be seen on one screen."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detectron2.layers import ShapeSpec


class Block(nn.Module):
    """A convolution and an in-place ReLU, as residual blocks end."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.LazyConv2d(channels, 1, stride=stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x))


class BottomUp(nn.Module):
    """Stages "res2" and "res3" of strides 4 and 8; only "res3" is an output."""

    stage_names = ("res2", "res3")

    def __init__(self, width: int) -> None:
        super().__init__()
        self.res2 = nn.Sequential(Block(width, 4))
        self.res3 = nn.Sequential(Block(width, 2), Block(width, 1))

    def output_shape(self) -> Mapping[str, ShapeSpec]:
        return {"res3": ShapeSpec(channels=4, stride=8)}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"res3": self.res3(self.res2(x))}


class Pool(nn.Module):
    """The level that R-CNNs pool from the one below."""

    num_levels = 1


class Neck(nn.Module):
    """Outputs of 8 channels by name and stride, each a convolution of "res3"; the last one may be pooled."""

    def __init__(self, outputs: Mapping[str, int], width: int = 4, pooled: bool = False) -> None:
        super().__init__()
        self.bottom_up = BottomUp(width)
        self.outputs = dict(outputs)
        self.convs = nn.ModuleDict({name: nn.LazyConv2d(8, 1) for name in outputs})
        if pooled:
            self.top_block = Pool()

    def output_shape(self) -> Mapping[str, ShapeSpec]:
        return {name: ShapeSpec(channels=8, stride=stride) for name, stride in self.outputs.items()}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        stage = self.bottom_up(x)["res3"]
        side = {name: max(1, x.shape[-1] // stride) for name, stride in self.outputs.items()}
        return {name: nn.functional.interpolate(self.convs[name](stage), size=side[name]) for name in self.outputs}


class FakeDetector(nn.Module):
    """A backbone, and a head that runs once on each of its outputs."""

    def __init__(self, outputs: Mapping[str, int] | None = None, width: int = 4, pooled: bool = False) -> None:
        super().__init__()
        self.backbone = Neck(outputs or {"p3": 8, "p4": 16}, width, pooled)
        self.head = nn.LazyConv2d(3, 1)
        self.eval()(images())

    def forward(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        features = self.backbone(torch.stack([x["image"].float() for x in batched_inputs]))
        return [self.head(feature) for feature in features.values()]


def images(count: int = 2, size: int = 64) -> list[dict[str, Tensor]]:
    """A batch in Detectron2's input format."""
    generator = torch.Generator().manual_seed(0)
    return [{"image": torch.randint(-99, 99, (3, size, size), generator=generator).float()} for _ in range(count)]
