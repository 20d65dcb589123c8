"""Heads that segment the object in a region (Mask R-CNN, arXiv 1703.06870)."""

from typing import Any

import torch
import torch.nn.functional as F
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn

from d2lite.config import CfgNode, configurable
from d2lite.layers import Conv2d, ConvTranspose2d, ShapeSpec, get_norm
from d2lite.structures import Instances
from d2lite.utils.events import EventStorage, get_event_storage
from d2lite.utils.registry import Registry

ROI_MASK_HEAD_REGISTRY = Registry("ROI_MASK_HEAD")
"""Modules that turn pooled features (R, C, H, W) and the instances of their regions into mask losses or masks.

Called as `cls(cfg, input_shape)` with a `ShapeSpec`.
"""


def build_mask_head(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """Builds the head named by `cfg.MODEL.ROI_MASK_HEAD.NAME` for pooled features of `input_shape`."""
    return ROI_MASK_HEAD_REGISTRY.build(cfg.MODEL.ROI_MASK_HEAD.NAME, cfg, input_shape)


def mask_rcnn_loss(pred_mask_logits: Tensor, instances: list[Instances], vis_period: int = 0) -> Tensor:
    """Mean binary cross entropy between the predicted mask of the true class and the true mask in the region.

    Args:
        pred_mask_logits: (R, K, M, M) for the R foreground regions of all images and K classes, or K = 1 for
            all classes together.
        instances: of N images, R in all, with `proposal_boxes`, `gt_classes` and `gt_masks`.
        vis_period: iterations between visualizations in the event storage; 0 for none.

    Returns:
        A scalar; 0, still connected to the predictions, where R is 0.
    """
    if pred_mask_logits.shape[2] != pred_mask_logits.shape[3]:
        raise ValueError(f"Mask predictions must be square, got shape {tuple(pred_mask_logits.shape)}")
    instances = [x for x in instances if len(x) > 0]
    if not instances:
        return 0.0 * pred_mask_logits.sum()
    targets = torch.cat([_mask_targets(x, pred_mask_logits) for x in instances])
    logits = _masks_of_classes(pred_mask_logits, [x.gt_classes for x in instances])[:, 0]

    events = get_event_storage()
    _log_mask_accuracy(events, logits.detach() > 0, targets)
    if vis_period > 0 and events.iter % vis_period == 0:
        for i, pair in enumerate(torch.cat([logits.detach().sigmoid(), targets.to(logits)], dim=2)):
            events.put_image(f"Left: mask prediction;   Right: mask GT ({i})", pair.expand(3, -1, -1))
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))


def _masks_of_classes(masks: Tensor, classes: list[Tensor]) -> Tensor:
    """From masks (R, K, M, M) for all classes, or (R, 1, M, M), those of the class of each region: (R, 1, M, M)."""
    if masks.shape[1] == 1:
        return masks
    index = torch.cat(classes).to(torch.int64)
    return masks[torch.arange(len(index), device=index.device), index][:, None]


def _mask_targets(instances: Instances, pred_mask_logits: Tensor) -> Tensor:
    """The true masks (R_i, M, M) bool in the regions of one image."""
    if not instances.has("gt_masks"):
        raise ValueError(
            "MODEL.MASK_ON needs `gt_masks` in the ground truth of every image with objects: give the"
            " annotations a `segmentation`, or turn MODEL.MASK_ON off"
        )
    boxes = instances.proposal_boxes.tensor.detach()
    targets = instances.gt_masks.crop_and_resize(boxes, pred_mask_logits.shape[-1])
    return targets.to(device=pred_mask_logits.device, dtype=torch.bool)


def _log_mask_accuracy(storage: EventStorage, predicted: Tensor, targets: Tensor) -> None:
    wrong = predicted != targets
    counts = torch.stack([targets.sum(), (wrong & ~targets).sum(), (wrong & targets).sum()])
    positives, false_positives, false_negatives = counts.tolist()
    total = targets.numel()
    storage.put_scalar("mask_rcnn/accuracy", 1 - (false_positives + false_negatives) / total)
    storage.put_scalar("mask_rcnn/false_positive", false_positives / max(total - positives, 1))
    storage.put_scalar("mask_rcnn/false_negative", false_negatives / max(positives, 1))


def mask_rcnn_inference(pred_mask_logits: Tensor, pred_instances: list[Instances]) -> None:
    """Stores in each of the N `pred_instances` the field `pred_masks` (R_i, 1, M, M): for each detection the
    probabilities of the mask of its class, relative to its box.

    Args:
        pred_mask_logits: (R, K, M, M) for the R detections of all images and K classes, or K = 1 for all
            classes together.
        pred_instances: with `pred_classes`, R in all.
    """
    if not pred_instances:
        return
    logits = _masks_of_classes(pred_mask_logits, [x.pred_classes for x in pred_instances])
    for instances, masks in zip(pred_instances, logits.sigmoid().split([len(x) for x in pred_instances])):
        instances.pred_masks = masks


class BaseMaskRCNNHead(nn.Module):
    """The losses and the inference of a mask head; subclasses give the `layers`."""

    @configurable
    def __init__(self, *, loss_weight: float = 1.0, vis_period: int = 0) -> None:
        """
        Args:
            loss_weight: factor of the loss.
            vis_period: iterations between visualizations in the event storage; 0 for none.
        """
        super().__init__()
        self.vis_period = vis_period
        self.loss_weight = loss_weight

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        """Constructor arguments from the configuration; `input_shape` is for subclasses."""
        return dict(vis_period=cfg.VIS_PERIOD)

    def forward(self, x: Tensor, instances: list[Instances]) -> dict[str, Tensor] | list[Instances]:
        """
        Args:
            x: pooled features (R, C, H, W) of the regions of all images.
            instances: of the same regions; see `mask_rcnn_loss` and `mask_rcnn_inference`.

        Returns:
            In training {"loss_mask": scalar}, otherwise `instances` with the field `pred_masks`.
        """
        logits = self.layers(x)
        if not self.training:
            mask_rcnn_inference(logits, instances)
            return instances
        loss = mask_rcnn_loss(logits, instances, self.vis_period)
        return {"loss_mask": loss * self.loss_weight}

    def layers(self, x: Tensor) -> Tensor:
        """From features (R, C, H, W) to logits (R, K, M, M)."""
        raise NotImplementedError(f"{type(self).__name__} must implement layers()")


@ROI_MASK_HEAD_REGISTRY.register()
class MaskRCNNConvUpsampleHead(BaseMaskRCNNHead, nn.Sequential):
    """3x3 convolutions, a transposed convolution that doubles the size, and a 1x1 convolution per class."""

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        conv_dims: list[int],
        conv_norm: str = "",
        **kwargs: Any,
    ) -> None:
        """
        Args:
            input_shape: of the pooled features; only the channels matter.
            num_classes: foreground classes, or 1 for one mask for all classes.
            conv_dims: output channels of the convolutions; the last one is the transposed convolution.
            conv_norm: normalization of the convolutions, see `get_norm`.
            kwargs: see `BaseMaskRCNNHead`.
        """
        super().__init__(**kwargs)
        if not conv_dims:
            raise ValueError("MaskRCNNConvUpsampleHead: conv_dims must have at least the transposed convolution")
        channels = input_shape.channels
        for i, dim in enumerate(conv_dims[:-1], start=1):
            options = dict(bias=not conv_norm, norm=get_norm(conv_norm, dim), activation=nn.ReLU(inplace=not conv_norm))
            self.add_module(f"mask_fcn{i}", Conv2d(channels, dim, 3, padding=1, **options))
            channels = dim
        self.deconv = ConvTranspose2d(channels, conv_dims[-1], kernel_size=2, stride=2)
        self.deconv_relu = nn.ReLU()
        self.predictor = Conv2d(conv_dims[-1], num_classes, kernel_size=1)
        for layer in self:
            if isinstance(layer, (Conv2d, ConvTranspose2d)) and layer is not self.predictor:
                c2_msra_fill(layer)
        # close to 0, so that training starts from undecided masks
        last = self.predictor
        nn.init.normal_(last.weight, std=0.001)
        nn.init.zeros_(last.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        head, base = cfg.MODEL.ROI_MASK_HEAD, super().from_config(cfg, input_shape)
        dims = [head.CONV_DIM] * (head.NUM_CONV + 1)
        num_classes = 1 if head.CLS_AGNOSTIC_MASK else cfg.MODEL.ROI_HEADS.NUM_CLASSES
        return dict(base, input_shape=input_shape, num_classes=num_classes, conv_dims=dims, conv_norm=head.NORM)

    def layers(self, x: Tensor) -> Tensor:
        """From features (R, C, H, W) to logits (R, K, 2 * H, 2 * W)."""
        for layer in self:
            x = layer(x)
        return x
