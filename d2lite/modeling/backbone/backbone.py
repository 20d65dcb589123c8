"""The interface of all backbones."""

from abc import ABCMeta, abstractmethod

from torch import Tensor, nn

from d2lite.layers import ShapeSpec


class Backbone(nn.Module, metaclass=ABCMeta):
    """A network from images (N, C, H, W) to a dict of feature maps.

    Subclasses set `_out_features` (names), `_out_feature_channels` and `_out_feature_strides`
    (dicts by name), or override `output_shape`.
    """

    @abstractmethod
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Returns {name: (N, C_name, H / stride_name, W / stride_name)}."""

    @property
    def size_divisibility(self) -> int:
        """Height and width of the input must be multiples of this; 0 if any size will do."""
        return 0

    @property
    def padding_constraints(self) -> dict[str, int]:
        """Further constraints on the padding of the input: "square_size" and "size_divisibility" (0 = none)."""
        return {}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every feature map."""
        return {
            name: ShapeSpec(channels=self._out_feature_channels[name], stride=self._out_feature_strides[name])
            for name in self._out_features
        }
