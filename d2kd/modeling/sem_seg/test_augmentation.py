"""Test-time augmentation of segmentors: probabilities averaged over scales and flips."""

from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode
from detectron2.data.transforms import HFlipTransform
from detectron2.modeling import DatasetMapperTTA


class SegmentorWithTTA(nn.Module):
    """A segmentor that sees every image at the sizes of TEST.AUG, each plain and flipped.

    It takes what `SemanticSegmentor` does in evaluation, and gives the mean probabilities of the classes.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module) -> None:
        """
        Args:
            cfg: TEST.AUG is used.
            model: a SemanticSegmentor.
        """
        super().__init__()
        self.model = model
        self.mapper = DatasetMapperTTA(cfg)

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Returns {"sem_seg": (num_classes, height, width) probabilities} for each image."""
        return [{"sem_seg": self._probabilities(x)} for x in batched_inputs]

    def _probabilities(self, x: dict[str, Any]) -> Tensor:
        height, width = x.get("height", x["image"].shape[1]), x.get("width", x["image"].shape[2])
        seen = self.mapper({**x, "image": x["image"].cpu(), "height": height, "width": width})
        total: Any = 0
        for _, versions in groupby(seen, key=lambda version: version["image"].shape):  # a scale, plain and flipped
            together = list(versions)
            inputs = [{"image": v["image"], "height": height, "width": width} for v in together]
            for version, output in zip(together, self.model(inputs)):
                probabilities = output["sem_seg"].softmax(0)
                total = total + (probabilities.flip(-1) if _is_flipped(version) else probabilities)
        mean: Tensor = total / len(seen)
        return mean


def _is_flipped(version: dict[str, Any]) -> bool:
    return sum(isinstance(t, HFlipTransform) for t in version["transforms"].transforms) % 2 == 1
