"""Semantic segmentation: a class for every pixel, with the FPN head of arXiv 1901.02446."""

import math
from collections.abc import Callable, Sequence

import torch
from fvcore.nn import weight_init
from torch import nn
from torch.nn import functional as F

from d2lite.config import CfgNode, configurable
from d2lite.layers import Conv2d, ShapeSpec, get_norm
from d2lite.modeling.backbone import Backbone, build_backbone
from d2lite.modeling.meta_arch.build import META_ARCH_REGISTRY
from d2lite.modeling.meta_arch.image_model import ImageModel
from d2lite.modeling.meta_arch.inputs import output_size, semantic_labels
from d2lite.modeling.postprocessing import sem_seg_postprocess
from d2lite.utils.registry import Registry

__all__ = ["SEM_SEG_HEADS_REGISTRY", "SemSegFPNHead", "SemanticSegmentor", "build_sem_seg_head"]

SEM_SEG_HEADS_REGISTRY = Registry("SEM_SEG_HEADS")
"""Heads that turn a dict of features into per-pixel class scores or losses, called as `cls(cfg, input_shape)`."""


def build_sem_seg_head(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """Builds the head named by `cfg.MODEL.SEM_SEG_HEAD.NAME` for features of `input_shape`."""
    return SEM_SEG_HEADS_REGISTRY.build(cfg.MODEL.SEM_SEG_HEAD.NAME, cfg, input_shape)


@META_ARCH_REGISTRY.register()
class SemanticSegmentor(ImageModel):
    """A backbone and a head that scores every pixel."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        """
        Args:
            backbone, pixel_mean, pixel_std: see `ImageModel`.
            sem_seg_head: turns features (and, in training, labels) into (scores, losses).
        """
        super().__init__(backbone, pixel_mean, pixel_std)
        self.sem_seg_head = sem_seg_head

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Constructor arguments from the configuration, with both parts of the model built."""
        net = build_backbone(cfg)
        return {
            "backbone": net,
            "sem_seg_head": build_sem_seg_head(cfg, net.output_shape()),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def forward(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]:
        """
        Args:
            batched_inputs: one dict per image: "image" (C, H, W), in training "sem_seg" (H, W) integer
                labels, and optionally "height" and "width", the resolution wanted for the output.

        Returns:
            In training a dict of losses. Otherwise one {"sem_seg": (num_classes, height, width) logits} per
            image.
        """
        images, features = self.extract_features(batched_inputs)
        if self.training:
            labels = semantic_labels(batched_inputs, self.backbone, self.device, self.sem_seg_head)
            return self.sem_seg_head(features, labels)[1]
        return [
            {"sem_seg": sem_seg_postprocess(logits, size, *output_size(x, size))}
            for logits, x, size in zip(self.sem_seg_head(features, None)[0], batched_inputs, images.image_sizes)
        ]


@SEM_SEG_HEADS_REGISTRY.register()
class SemSegFPNHead(nn.Module):
    """The semantic branch of Panoptic FPN (arXiv 1901.02446, section 3.1): every level is brought to a common
    stride by convolutions and upsampling, the levels are summed, and a 1x1 convolution scores the classes.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        num_classes: int,
        conv_dims: int,
        common_stride: int,
        loss_weight: float = 1.0,
        norm: str | Callable | None = None,
        ignore_value: int = -1,
    ) -> None:
        """
        Args:
            input_shape: the features that the head takes.
            num_classes: classes to score.
            conv_dims: width of the convolutions.
            common_stride: stride at which the levels are summed.
            loss_weight: factor of the loss.
            norm: normalization after each convolution.
            ignore_value: label of the pixels without a class.
        """
        super().__init__()
        if not input_shape:
            raise ValueError("SemSegFPNHead needs at least one feature (MODEL.SEM_SEG_HEAD.IN_FEATURES)")
        shapes = sorted(input_shape.items(), key=lambda item: item[1].stride)
        self.in_features = [name for name, _ in shapes]
        self.num_classes = num_classes
        self.ignore_value = ignore_value
        self.common_stride = common_stride
        self.loss_weight = loss_weight

        for name, shape in shapes:
            self.add_module(name, _scale_head(shape, conv_dims, common_stride, norm))
        self.predictor = Conv2d(conv_dims, num_classes, kernel_size=1)
        weight_init.c2_msra_fill(self.predictor)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Constructor arguments from MODEL.SEM_SEG_HEAD."""
        return {
            "input_shape": {k: v for k, v in input_shape.items() if k in cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES},
            "ignore_value": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "conv_dims": cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM,
            "common_stride": cfg.MODEL.SEM_SEG_HEAD.COMMON_STRIDE,
            "norm": cfg.MODEL.SEM_SEG_HEAD.NORM,
            "loss_weight": cfg.MODEL.SEM_SEG_HEAD.LOSS_WEIGHT,
        }

    def forward(
        self, features: dict[str, torch.Tensor], targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """
        Args:
            features: maps each input feature to (N, C, Hi, Wi).
            targets: (N, H, W) labels, needed in training.

        Returns:
            In training (None, losses), otherwise (logits (N, num_classes, H, W) at the input resolution, {}).
        """
        logits = self.layers(features)
        return (None, self.losses(logits, targets)) if self.training else (self._upsample(logits), {})

    def layers(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits (N, num_classes, H / common_stride, W / common_stride)."""
        x = sum(getattr(self, name)(features[name]) for name in self.in_features)
        return self.predictor(x)

    def losses(self, predictions: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """The mean cross-entropy "loss_sem_seg" over the pixels that have a class; 0 where none has.

        Args:
            predictions: logits at the common stride, as returned by `layers`.
            targets: (N, H, W) labels at the input resolution.
        """
        logits = self._upsample(predictions.float())  # half precision is too coarse for interpolated logits
        total = F.cross_entropy(logits, targets, reduction="sum", ignore_index=self.ignore_value)
        count = (targets != self.ignore_value).sum().clamp(min=1)
        return {"loss_sem_seg": total / count * self.loss_weight}

    def _upsample(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, scale_factor=self.common_stride, mode="bilinear", align_corners=False)


def _scale_head(shape: ShapeSpec, conv_dims: int, common_stride: int, norm: str | Callable | None) -> nn.Sequential:
    """Convolutions that bring one feature to `common_stride`, each followed by twofold upsampling."""
    layers: list[nn.Module] = []
    num_upsamplings = int(math.log2(shape.stride) - math.log2(common_stride))
    in_channels = shape.channels
    for _ in range(max(1, num_upsamplings)):
        conv = Conv2d(
            in_channels,
            conv_dims,
            kernel_size=3,
            padding=1,
            bias=not norm,
            norm=get_norm(norm, conv_dims),
            activation=F.relu,
        )
        weight_init.c2_msra_fill(conv)
        layers.append(conv)
        if num_upsamplings > 0:
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
        in_channels = conv_dims
    return nn.Sequential(*layers)
