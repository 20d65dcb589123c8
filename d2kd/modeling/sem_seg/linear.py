"""SEM_SEG_HEAD "LinearSemSegHead": one linear layer on a map, as on the tokens of a plain vision transformer."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from d2kd.errors import ConfigError
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY

from .losses import pixel_cross_entropy, resize_logits

#: Norms that look at one place only.
_LOCAL_NORMS = ("", "LN")


@SEM_SEG_HEADS_REGISTRY.register()
class LinearSemSegHead(nn.Module):
    """Scores the classes of each cell of one map by itself, and enlarges the scores.

    Attributes:
        token_local: no cell sees another one, so that a teacher that computes some of the cells scores these exactly.
    """

    token_local: ClassVar[bool] = True

    @configurable
    def __init__(
        self,
        in_feature: str,
        in_channels: int,
        stride: int,
        *,
        num_classes: int,
        norm: str = "LN",
        ignore_value: int = 255,
        loss_weight: float = 1.0,
    ) -> None:
        """
        Args:
            in_feature: name of the map.
            in_channels: its channels.
            stride: its stride in pixels.
            num_classes: classes to score.
            norm: before the layer: "LN" over the channels of each cell, or "" for none.
            ignore_value: label of pixels that do not count.
            loss_weight: factor on the loss.
        """
        super().__init__()
        self.in_feature = in_feature
        self.stride = stride
        self.ignore_value = ignore_value
        self.loss_weight = loss_weight
        self.norm = get_norm(norm, in_channels) or nn.Identity()
        self.predictor = nn.Conv2d(in_channels, num_classes, kernel_size=1)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Constructor arguments from MODEL.SEM_SEG_HEAD.

        Raises:
            ConfigError: not one map is named, or NORM looks at other places.
        """
        node = cfg.MODEL.SEM_SEG_HEAD
        names = [name for name in node.IN_FEATURES if name in input_shape]
        if len(names) != 1 or len(node.IN_FEATURES) != 1:
            raise ConfigError(
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES is {list(node.IN_FEATURES)}; LinearSemSegHead takes one of "
                f"{', '.join(input_shape)}."
            )
        if node.NORM not in _LOCAL_NORMS:
            raise ConfigError(
                f"MODEL.SEM_SEG_HEAD.NORM is {node.NORM!r}; LinearSemSegHead looks at each place by itself: LN or ''."
            )
        shape = input_shape[names[0]]
        return {
            "in_feature": names[0],
            "in_channels": shape.channels,
            "stride": shape.stride,
            "num_classes": node.NUM_CLASSES,
            "norm": node.NORM,
            "ignore_value": node.IGNORE_VALUE,
            "loss_weight": node.LOSS_WEIGHT,
        }

    def forward(
        self, features: Mapping[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """
        Args:
            features: the map (N, C, H, W) by its name.
            targets: (N, height, width) labels of the padded images, in training.

        Returns:
            In training (None, {"loss_sem_seg": the mean over pixels that count; 0 where none does}), else (logits
            (N, classes, height, width), {}).
        """
        logits = self.layers(features)
        h, w = logits.shape[-2:]
        logits = resize_logits(logits, (h * self.stride, w * self.stride), align_corners=False)
        if not self.training or targets is None:
            return logits, {}
        loss = pixel_cross_entropy(logits, targets, self.ignore_value, average="valid")
        return None, {"loss_sem_seg": self.loss_weight * loss}

    def layers(self, features: Mapping[str, Tensor]) -> Tensor:
        """Returns the logits of the cells, (N, classes, H, W)."""
        logits: Tensor = self.predictor(self.norm(features[self.in_feature]))
        return logits
