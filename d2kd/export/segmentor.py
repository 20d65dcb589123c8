"""Semantic segmentors as a graph: logits of every pixel, in the size of the image."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Exported, ExportError, register_export, stacked_inputs


@register_export("SemanticSegmentor")
class SegmentorExport(Exported):
    """Detectron2's SemanticSegmentor and d2kd's Segmentor, which predicts from whole images."""

    TASK = "segmentation"
    OUTPUTS = ("logits",)

    def __init__(self, model: nn.Module) -> None:
        """See the base class.

        Raises:
            ExportError: it predicts from sliding windows.
        """
        super().__init__(model)
        if getattr(model, "windows", None) is not None:
            raise ExportError(
                "TEST.SLIDING_WINDOW.ENABLED is True, and windows have no export: set it False, and slide the exported "
                "network over the image."
            )

    @property
    def num_classes(self) -> int:
        """See the base class."""
        head = self.model.sem_seg_head
        return int(getattr(head, "num_classes", None) or head.predictor.out_channels)

    @property
    def align_corners(self) -> bool:
        """See the base class: as d2kd's Segmentor, which resizes the logits itself, is configured."""
        return hasattr(self.model, "windows") and bool(getattr(self.model.sem_seg_head, "align_corners", False))

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> (N, K, H, W) logits in float32; the class of a pixel is that of the greatest."""
        head: Any = self.model.sem_seg_head
        padded = self.normalized(images)
        features = self.model.backbone(padded)
        if hasattr(self.model, "windows"):  # d2kd's Segmentor, which resizes the logits itself
            logits = F.interpolate(
                head.layers(features).float(),
                size=padded.shape[2:],
                mode="bilinear",
                align_corners=self.align_corners,
            )
        else:
            logits = head(features, None)[0].float()
        return logits[:, :, : images.shape[2], : images.shape[3]]

    def eager(self, images: Tensor) -> tuple[Tensor, ...]:
        """See the base class."""
        return (torch.stack([x["sem_seg"] for x in self.model(stacked_inputs(images))]),)
