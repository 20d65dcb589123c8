"""The head of RetinaNet (arXiv 1708.02002), which FCOS builds on too."""

import logging
import math
from collections.abc import Callable

import torch
from torch import nn

from d2lite.config import CfgNode, configurable
from d2lite.layers import CycleBatchNormList, ShapeSpec, get_norm
from d2lite.modeling.anchor_generator import build_anchor_generator

logger = logging.getLogger(__name__)


class RetinaNetHead(nn.Module):
    """Two subnets of 3x3 convolutions, one for classes and one for boxes, shared by all levels."""

    @configurable
    def __init__(
        self,
        *,
        input_shape: list[ShapeSpec],
        num_classes: int,
        num_anchors: int,
        conv_dims: list[int],
        norm: str | Callable = "",
        prior_prob: float = 0.01,
    ) -> None:
        """
        Args:
            input_shape: the features that the head takes, all of the same width.
            num_classes: K, the classes without background.
            num_anchors: A, the anchors per cell.
            conv_dims: width of each convolution of a subnet.
            norm: normalization after each of them. "BN" and "SyncBN" keep separate statistics for each level,
                as these differ in scale; the features must then always come in the same order.
            prior_prob: initial probability of the foreground (section 4.1 of the paper).
        """
        super().__init__()
        self._num_levels = len(input_shape)
        norm = self._norm_per_level(norm)
        in_channels = input_shape[0].channels
        self.cls_subnet = self._subnet(in_channels, conv_dims, norm)
        self.bbox_subnet = self._subnet(in_channels, conv_dims, norm)
        width = conv_dims[-1] if conv_dims else in_channels
        self.cls_score = nn.Conv2d(width, num_anchors * num_classes, 3, padding=1)
        self.bbox_pred = nn.Conv2d(width, num_anchors * 4, 3, padding=1)
        for conv in (module for module in self.modules() if isinstance(module, nn.Conv2d)):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        nn.init.constant_(self.cls_score.bias, -math.log((1 - prior_prob) / prior_prob))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict:
        """Constructor arguments from MODEL.RETINANET.

        Raises:
            AssertionError: if MODEL.ANCHOR_GENERATOR gives the levels different numbers of anchors.
        """
        per_cell = build_anchor_generator(cfg, input_shape).num_cell_anchors
        assert len(set(per_cell)) == 1, (
            f"RetinaNet shares its head between levels, so all need as many anchors per cell; got "
            f"{per_cell} (MODEL.ANCHOR_GENERATOR.SIZES, ASPECT_RATIOS)"
        )
        node = cfg.MODEL.RETINANET
        sizes = dict(num_classes=node.NUM_CLASSES, num_anchors=per_cell[0])
        dims = [input_shape[0].channels] * node.NUM_CONVS
        return dict(input_shape=input_shape, conv_dims=dims, prior_prob=node.PRIOR_PROB, norm=node.NORM, **sizes)

    def _norm_per_level(self, norm: str | Callable) -> str | Callable:
        if norm in ("BN", "SyncBN"):
            kind, levels = {"BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm}[norm], self._num_levels
            logger.info("RetinaNetHead keeps separate %s statistics for each of %d levels.", norm, levels)
            return lambda channels: CycleBatchNormList(levels, bn_class=kind, num_features=channels)
        if isinstance(get_norm(norm, 32), nn.modules.batchnorm._BatchNorm):
            logger.warning("RetinaNetHead shares the batch statistics of norm '%s' between its levels.", norm)
        return norm

    @staticmethod
    def _subnet(in_channels: int, conv_dims: list[int], norm: str | Callable) -> nn.Sequential:
        layers: list[nn.Module] = []
        for out_channels in conv_dims:
            layers.append(nn.Conv2d(in_channels, out_channels, 3, padding=1))
            if norm:
                layers.append(get_norm(norm, out_channels))
            layers.append(nn.ReLU())
            in_channels = out_channels
        return nn.Sequential(*layers)

    def forward(self, features: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """
        Args:
            features: (N, C, Hi, Wi) of each level.

        Returns:
            logits: (N, A * K, Hi, Wi) of each level, class varies fastest.
            bbox_reg: (N, A * 4, Hi, Wi) of each level, (dx, dy, dw, dh) of each anchor.
        """
        self._check_features(features)
        logits = [self.cls_score(self.cls_subnet(x)) for x in features]
        bbox_reg = [self.bbox_pred(self.bbox_subnet(x)) for x in features]
        return logits, bbox_reg

    def _check_features(self, features: list[torch.Tensor]) -> None:
        assert len(features) == self._num_levels, (
            f"the head was made for {self._num_levels} features, got {len(features)}"
        )
