"""What the heads of segmentors are built of: convolution, normalization and ReLU, and the classifier of pixels."""

import torch.nn.functional as F
from fvcore.nn import weight_init
from torch import nn

from detectron2.layers import Conv2d, get_norm


def conv_block(in_channels: int, out_channels: int, kernel_size: int, norm: str, dilation: int = 1) -> Conv2d:
    """Returns a convolution that keeps the size of the map, normalization and ReLU.

    Args:
        in_channels, out_channels: of the convolution.
        kernel_size: 1 or 3.
        norm: by Detectron2's name; without one the convolution has a bias.
        dilation: of the convolution.
    """
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        padding=kernel_size // 2 * dilation,
        dilation=dilation,
        bias=not norm,
        norm=get_norm(norm, out_channels),
        activation=F.relu,
    )
    weight_init.c2_msra_fill(conv)
    return conv


def pixel_classifier(in_channels: int, num_classes: int) -> Conv2d:
    """Returns the 1x1 convolution that scores the classes, with weights of deviation 0.01 and no bias at first."""
    predictor = Conv2d(in_channels, num_classes, kernel_size=1)
    nn.init.normal_(predictor.weight, std=0.01)
    nn.init.zeros_(predictor.bias)
    return predictor
