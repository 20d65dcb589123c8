"""The pyramid of plain backbones, which have one feature map (ViTDet, arXiv 2203.16527, section 3)."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from d2lite.layers import Conv2d, get_norm
from d2lite.layers.batch_norm import Norm
from d2lite.modeling.backbone.backbone import Backbone
from d2lite.modeling.backbone.fpn import _check_strides, _declare_levels, _find_level


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
        self.stages = []
        levels = []
        for scale, stride in zip(scale_factors, strides, strict=True):
            layers, channels = _rescale(scale, shape.channels, norm)
            for kernel_size, in_channels in ((1, channels), (3, out_channels)):
                layers.append(
                    Conv2d(
                        in_channels,
                        out_channels,
                        kernel_size=kernel_size,
                        padding=kernel_size // 2,
                        bias=not norm,
                        norm=get_norm(norm, out_channels),
                    )
                )
            levels.append(int(math.log2(stride)))
            stage = nn.Sequential(*layers)
            self.add_module(f"simfp_{levels[-1]}", stage)
            self.stages.append(stage)

        self.net = net
        self.in_feature = in_feature
        self.top_block = top_block
        _declare_levels(self, levels, out_channels)
        self._size_divisibility = strides[-1]
        self._square_pad = square_pad

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"size_divisibility": self._size_divisibility, "square_size": self._square_pad}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W) -> {"p<k>": (N, out_channels, H / 2^k, W / 2^k)}."""
        features = self.net(x)
        results = [stage(features[self.in_feature]) for stage in self.stages]
        if self.top_block is not None:
            source = _find_level(self.top_block.in_feature, features, results, self._out_features)
            results.extend(self.top_block(source))
        return dict(zip(self._out_features, results, strict=True))


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
