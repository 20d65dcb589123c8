"""Encodings of a box relative to another one, and the loss of dense heads that predict them."""

import math

import torch
from fvcore.nn import smooth_l1_loss
from torchvision.ops import generalized_box_iou_loss

from d2lite.layers import ciou_loss, diou_loss
from d2lite.structures import Boxes

# Limits exp() of the predicted scale, because a box 1000 / 16 times its source exceeds any image.
_DEFAULT_SCALE_CLAMP = math.log(1000.0 / 16)

_IOU_LOSSES = {"giou": generalized_box_iou_loss, "diou": diou_loss, "ciou": ciou_loss}


class Box2BoxTransform:
    """The R-CNN parametrization (dx, dy, dw, dh) of arXiv 1311.2524, appendix C: shift of the center in units of
    the source's width and height, and logarithm of the ratio of widths and heights, each times a weight.
    """

    def __init__(self, weights: tuple[float, float, float, float], scale_clamp: float = _DEFAULT_SCALE_CLAMP) -> None:
        """
        Args:
            weights: factors of (dx, dy, dw, dh). Fast R-CNN chose (10, 10, 5, 5), so that the deltas have
                about unit variance.
            scale_clamp: upper limit of dw and dh when they are decoded.
        """
        self.weights = weights
        self.scale_clamp = scale_clamp

    def get_deltas(self, src_boxes: torch.Tensor, target_boxes: torch.Tensor) -> torch.Tensor:
        """The deltas (N, 4) for which `apply_deltas(deltas, src_boxes) == target_boxes`; both are (N, 4) XYXY.

        Raises:
            AssertionError: if a source box has no width or height (not checked on a GPU, which would
                need a synchronization; the deltas are not finite then).
        """
        assert isinstance(src_boxes, torch.Tensor), type(src_boxes)
        assert isinstance(target_boxes, torch.Tensor), type(target_boxes)
        src_center, src_size = _center_and_size(src_boxes)
        if not src_boxes.is_cuda:
            assert bool((src_size > 0).all()), (
                "Box2BoxTransform.get_deltas: the width and height of all source boxes must be positive"
            )
        target_center, target_size = _center_and_size(target_boxes)
        shift = (target_center - src_center) / src_size
        scale = torch.log(target_size / src_size)
        wx, wy, ww, wh = self.weights
        return torch.cat([_scale_pairs(shift, wx, wy), _scale_pairs(scale, ww, wh)], dim=1)

    def apply_deltas(self, deltas: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Decodes predictions.

        Args:
            deltas: (N, 4 * k), k >= 1 predictions for each box.
            boxes: (N, 4) XYXY boxes that the deltas refer to.

        Returns:
            (N, 4 * k) XYXY boxes, of at least single precision.
        """
        deltas = deltas.float()  # half precision has too few digits for the coordinates of a box
        center, size = _center_and_size(boxes.to(deltas.dtype)[:, None])
        shift, scale = deltas.unflatten(1, (-1, 4)).split(2, dim=2)
        wx, wy, ww, wh = self.weights
        new_center = center + _scale_pairs(shift, 1 / wx, 1 / wy) * size
        half = 0.5 * size * _scale_pairs(scale, 1 / ww, 1 / wh).clamp(max=self.scale_clamp).exp()
        return torch.cat([new_center - half, new_center + half], dim=2).flatten(1)


class Box2BoxTransformLinear:
    """Distances (left, top, right, bottom) from the center of the source box to the sides of the target, as in
    FCOS (arXiv 1904.01355, equation 1).
    """

    def __init__(self, normalize_by_size: bool = True) -> None:
        """
        Args:
            normalize_by_size: measure the distances in units of the source's width and height instead of
                pixels.
        """
        self.normalize_by_size = normalize_by_size

    def get_deltas(self, src_boxes: torch.Tensor, target_boxes: torch.Tensor) -> torch.Tensor:
        """The distances (N, 4), one row for each of the (N, 4) XYXY source and target boxes. They are negative
        where the center of the source is outside the target.
        """
        assert isinstance(src_boxes, torch.Tensor), type(src_boxes)
        assert isinstance(target_boxes, torch.Tensor), type(target_boxes)
        center, size = _center_and_size(src_boxes)
        deltas = torch.cat([center - target_boxes[:, :2], target_boxes[:, 2:] - center], dim=1)
        return deltas / size.repeat(1, 2) if self.normalize_by_size else deltas

    def apply_deltas(self, deltas: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Decodes predictions.

        Args:
            deltas: (N, 4 * k), k >= 1 predictions for each box; negative distances count as 0.
            boxes: (N, 4) XYXY boxes that the deltas refer to.

        Returns:
            (N, 4 * k) XYXY boxes, of at least single precision.
        """
        distances = deltas.float().relu().unflatten(1, (-1, 4))
        center, size = _center_and_size(boxes.to(distances.dtype)[:, None])
        if self.normalize_by_size:
            distances = distances * size.repeat(1, 1, 2)
        before, after = distances.split(2, dim=2)
        return torch.cat([center - before, center + after], dim=2).flatten(1)


def _scale_pairs(pairs: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """Multiplies pairs (..., 2) by (x, y), without a tensor of factors: copying it to a GPU would block."""
    return pairs * x if x == y else torch.stack([pairs[..., 0] * x, pairs[..., 1] * y], dim=-1)


def _center_and_size(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centers (..., 2) and (width, height) (..., 2) of XYXY boxes (..., 4)."""
    corner, opposite = boxes.split(2, dim=-1)
    size = opposite - corner
    return corner + 0.5 * size, size


def _dense_box_regression_loss(
    anchors: list[Boxes | torch.Tensor],
    box2box_transform: Box2BoxTransform | Box2BoxTransformLinear,
    pred_anchor_deltas: list[torch.Tensor],
    gt_boxes: list[torch.Tensor],
    fg_mask: torch.Tensor,
    box_reg_loss_type: str = "smooth_l1",
    smooth_l1_beta: float = 0.0,
) -> torch.Tensor:
    """Sum of the regression loss over all foreground anchors of a batch, R anchors per image in all levels
    together.

    Args:
        anchors: boxes (R_i, 4) of each level.
        box2box_transform: how the deltas encode boxes.
        pred_anchor_deltas: predictions (N, R_i, 4) of each level.
        gt_boxes: N tensors (R, 4): the box matched to each anchor; only read at the foreground.
        fg_mask: (N, R) bool, the foreground anchors.
        box_reg_loss_type: "smooth_l1" (of the deltas), or "giou", "diou" or "ciou" (of the decoded boxes).
        smooth_l1_beta: where smooth L1 turns from quadratic to linear; 0 is plain L1.

    Returns:
        A scalar; 0, still connected to the predictions, where nothing is foreground.

    Raises:
        ValueError: for an unknown loss type.
    """
    if box_reg_loss_type != "smooth_l1" and box_reg_loss_type not in _IOU_LOSSES:
        raise ValueError(
            f"invalid dense box regression loss type '{box_reg_loss_type}', expected smooth_l1, giou, diou or ciou"
        )
    image, index = fg_mask.nonzero(as_tuple=True)
    all_anchors = torch.cat([x.tensor if isinstance(x, Boxes) else x for x in anchors])
    sources = all_anchors[index]
    targets = torch.stack(gt_boxes)[image, index]
    predicted = torch.cat(pred_anchor_deltas, dim=1)[image, index]
    if box_reg_loss_type == "smooth_l1":
        targets = box2box_transform.get_deltas(sources, targets)
        return smooth_l1_loss(predicted, targets, beta=smooth_l1_beta, reduction="sum")
    boxes = box2box_transform.apply_deltas(predicted, sources)
    return _IOU_LOSSES[box_reg_loss_type](boxes, targets, reduction="sum")
