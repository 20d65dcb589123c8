"""The auxiliary head: one more classifier of pixels, on an earlier map (arXiv 1612.01105, section 3.3)."""

from torch import Tensor, nn

from .blocks import conv_block, pixel_classifier


class AuxiliaryHead(nn.Module):
    """A 3x3 convolution, dropout and a classifier. It is for the training; predictions do not need it.

    Attributes:
        predictor: gives the logits, which can be tapped.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, *, dropout: float, norm: str) -> None:
        """
        Args:
            in_channels: of the map.
            channels: of the 3x3 convolution.
            num_classes: to score.
            dropout: share of the channels that is dropped before the classifier.
            norm: behind the 3x3 convolution, by Detectron2's name.
        """
        super().__init__()
        self.conv = conv_block(in_channels, channels, 3, norm)
        self.dropout = nn.Dropout2d(dropout)
        self.predictor = pixel_classifier(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to logits (N, num_classes, H, W)."""
        return self.predictor(self.dropout(self.conv(x)))
