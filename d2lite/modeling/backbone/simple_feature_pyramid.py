"""The pyramid of plain backbones, which have one feature map (ViTDet, arXiv 2203.16527, section 3)."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from d2lite.layers import get_norm
from d2lite.layers.batch_norm import Norm
from d2lite.modeling.backbone.backbone import Backbone
from d2lite.modeling.backbone.fpn import _check_strides, _declare_levels, _level_conv, _name_levels


class SimpleFeaturePyramid(Backbone):
    """Makes pyramid levels "p2", "p3", ... (stride 2^k) of one feature map, by deconvolution or pooling.

    Args:
        net: the network below, kept as `self.net`.
        in_feature: its feature map.
        out_channels: channels of all levels.
        scale_factors: size of each level relative to that map, of 4.0, 2.0, 1.0 and 0.5, finest first.
        top_block: as for `FPN`.
        norm: normalization in the levels, as for `get_norm`.
        square_pad: if positive, images are to be padded to squares of this size.

    Raises:
        NotImplementedError: for another scale factor.
    """

    def __init__(
        self,
        net: Backbone,
        in_feature: str,
        out_channels: int,
        scale_factors: Sequence[float],
        top_block: nn.Module | None = None,
        norm: Norm = "LN",
        square_pad: int = 0,
    ) -> None:
        super().__init__()
        shape = net.output_shape()[in_feature]
        strides = [int(shape.stride / scale) for scale in scale_factors]
        _check_strides({f"scale {scale}": s for scale, s in zip(scale_factors, strides, strict=True)})
        levels = [int(math.log2(stride)) for stride in strides]
        for scale, level in zip(scale_factors, levels, strict=True):
            layers, channels = _rescale(scale, shape.channels, norm)
            convs = [_level_conv(channels, out_channels, 1, norm), _level_conv(out_channels, out_channels, 3, norm)]
            self.add_module(f"simfp_{level}", nn.Sequential(*layers, *convs))
        # A plain list: they are registered by name already.
        self.stages = list(self.children())

        self.net = net
        self.in_feature = in_feature
        self.top_block = top_block
        _declare_levels(self, levels, out_channels)
        self._padding = {"size_divisibility": strides[-1], "square_size": square_pad}

    @property
    def padding_constraints(self) -> dict[str, int]:
        return dict(self._padding)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W) -> {"p<k>": (N, out_channels, H / 2^k, W / 2^k)}."""
        features = self.net(x)
        return _name_levels(self, features, [stage(features[self.in_feature]) for stage in self.stages])


def _rescale(scale: float, dim: int, norm: Norm) -> tuple[list[nn.Module], int]:
    """Layers that rescale a map of `dim` channels, and the number of channels they give."""
    if scale == 4.0:
        half = dim // 2
        layers = [
            nn.ConvTranspose2d(dim, half, kernel_size=2, stride=2),
            get_norm(norm, half) or nn.Identity(),
            nn.GELU(),
            nn.ConvTranspose2d(half, half // 2, kernel_size=2, stride=2),
        ]
        return layers, half // 2
    if scale == 2.0:
        return [nn.ConvTranspose2d(dim, dim // 2, kernel_size=2, stride=2)], dim // 2
    if scale == 1.0:
        return [], dim
    if scale == 0.5:
        return [nn.MaxPool2d(kernel_size=2, stride=2)], dim
    raise NotImplementedError(f"scale_factors has {scale}; SimpleFeaturePyramid supports 4.0, 2.0, 1.0 and 0.5")
