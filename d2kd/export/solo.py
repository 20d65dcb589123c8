"""SOLO as a graph: the masks of all cells above the threshold at once, and matrix NMS of a batch."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kd.modeling.meta_arch.solo.decoding import point_nms, tight_boxes
from d2kd.modeling.meta_arch.solo.head import DecoupledSOLOHead, MaskMaps

from .base import ExportError, register_export
from .detection import DetectionExport, has_area
from .suppression import best_of_images


@register_export("SOLO")
class SOLOExport(DetectionExport):
    """d2kd's SOLO; boxes are tight around the masks."""

    OUTPUTS = (*DetectionExport.OUTPUTS, "masks")

    def __init__(self, model: nn.Module) -> None:
        """See the base class.

        Raises:
            ExportError: duplicates are removed one after the other.
        """
        super().__init__(model)
        if self.model.thresholds.nms == "mask":
            raise ExportError("MODEL.SOLO.NMS is mask, which has no export: set it to gaussian or linear.")

    @property
    def divisor(self) -> int:
        """See the base class: all levels must divide the image."""
        return max(super().divisor, *(level.stride for level in self.model.levels))

    def lower_threshold(self, images: Sequence[Tensor]) -> Any:
        """See the base class; scores of classes are compared, before those of masks."""
        before = self.model.thresholds
        if sum(len(self.eager(x)[1]) for x in images) >= self.ENOUGH:
            return None
        scores = torch.cat([self._scores(x)[0].flatten() for x in images]).sort(descending=True)[0]
        number = 3 * self.ENOUGH
        between = float(scores[number - 1 : number + 1].mean())
        self.restore_threshold(dataclasses.replace(before, score=min(between, before.score), final_score=0.0))
        return before

    def restore_threshold(self, threshold: Any) -> None:
        """See the base class."""
        self.model.thresholds = threshold

    def _scores(self, images: Tensor) -> tuple[Tensor, list[MaskMaps]]:
        """Returns scores (N, S, K) of the S cells of all levels, and the maps of their masks."""
        model = self.model
        features = model.backbone(self.normalized(images))
        logits, maps = model.head([features[name] for name in model.head_in_features])
        scores = [point_nms(x.float().sigmoid()).flatten(2).transpose(1, 2) for x in logits]
        return torch.cat(scores, dim=1), maps

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            images: (N, 3, H, W), see `Exported`.

        Returns:
            boxes (D, 4) in XYXY pixels, scores (D,) by decreasing score within each image, classes (D,), number of
            the image (D,), int64, and which pixels are of each, (D, H, W) bool.
        """
        limits, number = self.model.thresholds, images.shape[0]
        table, maps = self._scores(images)
        image, cell, classes = (table > limits.score).nonzero().unbind(1)
        soft = self.cell_masks(maps, image, cell)
        inside = (soft > limits.mask).to(soft.dtype)
        area = inside.sum((1, 2))
        scores = table[image, cell, classes] * (soft * inside).sum((1, 2)) / area.clamp(min=1)
        strides = torch.cat(
            [
                torch.full((grid**2,), float(level.stride))
                for grid, level in zip(self.model.head.grids, self.model.levels)
            ]
        )
        index = (area > strides[cell]).nonzero()[:, 0]
        index = index[best_of_images(image[index], scores[index], number, limits.candidates)]
        image, classes, scores = image[index], classes[index], scores[index]
        scores = scores * decay(inside[index], image, classes, limits.nms, limits.sigma)
        enough = (scores >= limits.final_score).nonzero()[:, 0]
        kept = enough[best_of_images(image[enough], scores[enough], number, limits.limit)]
        masks = self.full_masks(soft[index[kept]], images)
        boxes = tight_boxes(masks)
        seen = has_area(boxes).nonzero()[:, 0]
        kept = kept[seen]
        return boxes[seen], scores[kept], classes[kept], image[kept], masks[seen]

    def cell_masks(self, maps: Sequence[MaskMaps], image: Tensor, cell: Tensor) -> Tensor:
        """Returns the probabilities (P, h, w) of the masks of cells, as large as those of the finest level."""
        head: Any = self.model.head
        decoupled = isinstance(head, DecoupledSOLOHead)
        size: Any = None
        parts, places, start = [], [], 0
        for level, (grid, of_level) in enumerate(zip(head.grids, maps)):
            place = ((cell >= start) & (cell < start + grid**2)).nonzero()[:, 0]
            mine, where = cell[place] - start, image[place]
            if decoupled:
                columns, rows = (x.float().sigmoid() for x in of_level)
                size = size or columns.shape[2:]
                columns, rows = (_resized(x, size) for x in (columns, rows))
                row = torch.div(mine, grid, rounding_mode="floor")
                found = columns[where, mine - row * grid] * rows[where, row]
            else:
                logits = head.mask_pred[level](of_level).float()[where, mine][:, None]
                found = F.interpolate(logits, scale_factor=2.0, mode="bilinear", align_corners=False).sigmoid()
                size = size or found.shape[2:]
                found = _resized(found, size)[:, 0]
            parts.append(found)
            places.append(place)
            start += grid**2
        return torch.cat(parts)[torch.cat(places).sort()[1]]

    def full_masks(self, soft: Tensor, images: Tensor) -> Tensor:
        """Returns masks (D, h, w), at a quarter of the padded image, as (D, H, W) bool."""
        large = F.interpolate(soft[:, None], scale_factor=4.0, mode="bilinear", align_corners=False)[:, 0]
        return large[:, : images.shape[2], : images.shape[3]] > self.model.thresholds.mask


def _resized(maps: Tensor, size: Any) -> Tensor:
    return F.interpolate(maps, size=(size[0], size[1]), mode="bilinear", align_corners=False)


def decay(inside: Tensor, image: Tensor, classes: Tensor, kernel: str, sigma: float) -> Tensor:
    """Returns what matrix NMS (arXiv 2003.10152, section 3.3) multiplies the scores of a batch of masks with.

    Args:
        inside: (P, H, W), 1 in a mask and 0 outside; better masks of an image before worse ones.
        image, classes: (P,).
        kernel, sigma: "gaussian" with this sigma, or "linear".
    """
    flat = inside.flatten(1)
    shared = flat @ flat.transpose(0, 1)
    areas = flat.sum(1)
    overlaps = shared / (areas[:, None] + areas - shared).clamp(min=1)
    place = torch.arange(flat.shape[0], device=flat.device)
    better = (place[:, None] < place) & (image[:, None] == image) & (classes[:, None] == classes)
    duplicates = overlaps * better.to(overlaps.dtype)
    # rows of what nothing changes, so that there are a maximum and a minimum where there are no masks
    own = torch.cat([torch.zeros_like(areas)[None], duplicates]).amax(0)[:, None]
    if kernel == "gaussian":
        lowered = torch.exp(-sigma * (duplicates.square() - own.square()))
    else:
        lowered = (1 - duplicates) / (1 - own).clamp(min=torch.finfo(own.dtype).eps)
    return torch.cat([torch.ones_like(areas)[None], lowered]).amin(0)
