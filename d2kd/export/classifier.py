"""Image classifiers as a graph: probabilities of the classes."""

import torch
from torch import Tensor, nn

from .base import Exported, register_export, stacked_inputs


@register_export("ImageClassifier")
class ClassifierExport(Exported):
    """d2kd's ImageClassifier; it takes images of the size that it was trained on, and batches of them."""

    TASK = "classification"
    OUTPUTS = ("scores",)

    def __init__(self, model: nn.Module) -> None:
        """See the base class."""
        super().__init__(model)
        self.fixed_side = int(getattr(model.backbone, "fixed_side", None) or 0)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> (N, K) probabilities in float32."""
        model = self.model
        normalized = (images - model.pixel_mean.float()) / model.pixel_std.float()
        features = model.backbone(normalized.to(next(model.parameters()).dtype))
        logits = (features["class_logits"] if model.head is None else model.head(features)).float()
        return logits.softmax(1) if model.loss == "softmax" else logits.sigmoid()

    def eager(self, images: Tensor) -> tuple[Tensor, ...]:
        """See the base class."""
        return (torch.stack([x["scores"] for x in self.model(stacked_inputs(images))]),)
