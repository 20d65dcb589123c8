"""What the locations of a batch learn, from the objects that they were given to."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from detectron2.structures import Instances

from .assigners import IGNORED


class StageTargets(NamedTuple):
    """The targets of one stage, for R locations in each of N images."""

    #: (N, R) int64 class; K is background.
    labels: Tensor
    #: (N, R) bool: whether the class is learned.
    counts: Tensor
    #: (N, R) bool: whether the box is learned.
    foreground: Tensor
    #: (N, R, 4) of foreground in pixels, else 0.
    boxes: Tensor

    def num_foreground(self) -> Tensor:
        """Returns the locations with an object, at least 1 an image, of all images together."""
        return self.foreground.sum(dim=1).clamp(min=1).sum()


def stage_targets(matches: Sequence[Tensor], gt_instances: Sequence[Instances], num_classes: int) -> StageTargets:
    """Returns the targets of a batch.

    Args:
        matches: for each image (R,) int64, the index of an object, `BACKGROUND` or `IGNORED`.
        gt_instances: for each image, `gt_boxes` and `gt_classes`.
        num_classes: K.
    """
    labels, boxes = [], []
    for match, truth in zip(matches, gt_instances):
        foreground = match >= 0
        label = torch.full_like(match, num_classes)
        box = truth.gt_boxes.tensor.new_zeros(len(match), 4)
        label[foreground] = truth.gt_classes[match[foreground]]
        box[foreground] = truth.gt_boxes.tensor[match[foreground]]
        labels.append(label)
        boxes.append(box)
    together = torch.stack(list(matches))
    return StageTargets(torch.stack(labels), together != IGNORED, together >= 0, torch.stack(boxes))
