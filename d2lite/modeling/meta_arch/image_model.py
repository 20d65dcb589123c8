"""Base class of all models: a backbone, and normalization of the images it takes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from d2lite.modeling.backbone import Backbone
from d2lite.modeling.meta_arch.inputs import batch_images
from d2lite.structures import Boxes, ImageList

MAX_VISUALIZED_BOXES = 20
"""Number of predictions drawn in a visualization of the training."""


class ImageModel(nn.Module):
    """Base of the models; a subclass defines `forward`."""

    def __init__(self, backbone: Backbone, pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> None:
        """
        Args:
            backbone: maps a batch of images to a dict of features.
            pixel_mean, pixel_std: per channel, to normalize the input image.
        """
        super().__init__()
        self.backbone = backbone
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @property
    def device(self) -> torch.device:
        """The device of the model; inputs are moved there."""
        return self.pixel_mean.device

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Normalizes, pads and batches the input images."""
        return batch_images(batched_inputs, self.backbone, self.pixel_mean, self.pixel_std)

    def extract_features(self, batched_inputs: list[dict]) -> tuple[ImageList, dict[str, torch.Tensor]]:
        """The images as the backbone takes them, and its features."""
        images = self.preprocess_image(batched_inputs)
        return images, self.backbone(images.tensor)


def visualize_boxes(image: np.ndarray, truth: Boxes, predicted: Boxes) -> np.ndarray:
    """Draws the annotated boxes left, the predicted ones right.

    Args:
        image: (H, W, 3) RGB in [0, 255].
        truth: the annotation.
        predicted: best first; the first `MAX_VISUALIZED_BOXES` are drawn.

    Returns:
        (3, H, 2 * W) uint8 RGB.
    """
    from d2lite.utils.visualizer import Visualizer

    shown = predicted.tensor[:MAX_VISUALIZED_BOXES].detach().cpu().numpy()
    pair = [Visualizer(image, None).overlay_instances(boxes=boxes) for boxes in (truth.to("cpu"), shown)]
    return np.hstack([picture.get_image() for picture in pair]).transpose(2, 0, 1)
