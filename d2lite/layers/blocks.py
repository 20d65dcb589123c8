"""The base class of convolutional blocks."""

from typing import TypeVar

from torch import nn

from d2lite.layers.batch_norm import FrozenBatchNorm2d

Block = TypeVar("Block", bound="CNNBlockBase")


class CNNBlockBase(nn.Module):
    """A block from (N, `in_channels`, H, W) to (N, `out_channels`, H / `stride`, W / `stride`)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride

    def freeze(self: Block) -> Block:
        """Stops training this block: freezes its parameters and turns its batch norms into frozen ones."""
        for p in self.parameters():
            p.requires_grad = False
        FrozenBatchNorm2d.convert_frozen_batchnorm(self)
        return self
