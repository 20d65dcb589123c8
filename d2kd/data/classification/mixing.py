"""What is done to a whole training batch of a classifier: mixup and cutmix, then random erasing, all of them timm's."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2kd.config import get_key
from detectron2.config import CfgNode

#: Mapped inputs of one batch.
Inputs = list[dict[str, Any]]


class BatchMix:
    """Mixes images and labels within a batch, and erases rectangles.

    Random numbers come from the global states of `random`, numpy and torch, which timm draws from.
    """

    def __init__(
        self,
        mixup: Any = None,
        erasing: Any = None,
        erasing_prob: float = 1.0,
        *,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        """
        Args:
            mixup: timm's `FastCollateMixup`; None mixes nothing.
            erasing: timm's `RandomErasing`, for normalized images; None erases nothing.
            erasing_prob: probability that an image is given to it.
            mean, std: of the images, in 0..255, with which they are normalized for it.
        """
        self.mixup = mixup
        self.erasing = erasing
        self.erasing_prob = erasing_prob
        self.mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)

    def __call__(self, inputs: Inputs) -> Inputs:
        """
        Args:
            inputs: with `image` (3, S, S) uint8 and `label`; with a mixup, an even number of them.

        Returns:
            The same, with other images, float32 where something may be erased, and where labels are mixed with
            `target`, (K,) float32.
        """
        images: Any = [x["image"] for x in inputs]
        targets: Tensor | None = None
        if self.mixup is not None:
            images, targets = self.mixup([(image, x["label"]) for image, x in zip(images, inputs)])
        if self.erasing is not None:
            # one tensor: a loading process hands over its parts at once
            images = (images if isinstance(images, Tensor) else torch.stack(images)).float()
            for image in images:
                self._erase(image)
        mixed = [{**x, "image": image} for x, image in zip(inputs, images)]
        if targets is not None:
            for x, target in zip(mixed, targets):
                x["target"] = target
        return mixed

    def _erase(self, image: Tensor) -> None:
        if random.random() < self.erasing_prob:  # else it need not be normalized and back
            self.erasing(image.sub_(self.mean).div_(self.std)).mul_(self.std).add_(self.mean)


def build_mix(cfg: CfgNode) -> BatchMix | None:
    """Returns the mix of a classifier's configuration; None where batches stay as they are."""
    node = cfg.INPUT.CLASSIFICATION
    mixes, erases = node.MIXUP > 0 or node.CUTMIX > 0, node.ERASING.PROB > 0
    if not mixes and not erases:
        return None
    from timm.data.mixup import FastCollateMixup  # slow, and of no use to detectors
    from timm.data.random_erasing import RandomErasing

    mixup = FastCollateMixup(
        mixup_alpha=node.MIXUP,
        cutmix_alpha=node.CUTMIX,
        prob=node.MIX_PROB,
        switch_prob=node.MIX_SWITCH_PROB,
        mode=node.MIX_MODE,
        label_smoothing=get_key(cfg, "MODEL.CLASSIFIER.LABEL_SMOOTHING", 0.0),
        num_classes=get_key(cfg, "MODEL.CLASSIFIER.NUM_CLASSES"),
    )
    erasing = RandomErasing(1.0, mode=node.ERASING.MODE, max_count=node.ERASING.COUNT, device="cpu")
    return BatchMix(
        mixup if mixes else None,
        erasing if erases else None,
        node.ERASING.PROB,
        mean=cfg.MODEL.PIXEL_MEAN,
        std=cfg.MODEL.PIXEL_STD,
    )
