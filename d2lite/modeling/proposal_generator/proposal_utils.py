"""Selection of proposals per image from the scored boxes of all anchors."""

import math
from collections.abc import Sequence

import torch

from d2lite.layers import batched_nms
from d2lite.structures import Boxes, Instances

# Ground truth that joins the proposals gets the logit of a probability just below 1, so that it is finite.
_GT_OBJECTNESS = 1.0 - 1e-10
_GT_LOGIT = math.log(_GT_OBJECTNESS / (1.0 - _GT_OBJECTNESS))


def find_top_rpn_proposals(
    proposals: list[torch.Tensor],
    pred_objectness_logits: list[torch.Tensor],
    image_sizes: list[tuple[int, int]],
    nms_thresh: float,
    pre_nms_topk: int,
    post_nms_topk: int,
    min_box_size: float,
    training: bool,
) -> list[Instances]:
    """The best proposals of each image: per level the `pre_nms_topk` best scores, clipped to the image, without
    small boxes, then non-maximum suppression within each level, and of what is left the `post_nms_topk` best.

    Args:
        proposals: boxes (N, R_i, 4) of each level, XYXY in pixels.
        pred_objectness_logits: scores (N, R_i) of each level.
        image_sizes: (height, width) of the N images.
        nms_thresh: IoU above which the lower score is suppressed.
        pre_nms_topk: per image and level.
        post_nms_topk: per image.
        min_box_size: boxes survive if both sides are longer than this, in pixels.
        training: whether non-finite predictions raise an error or are dropped.

    Returns:
        N `Instances` with `proposal_boxes` and `objectness_logits`, by descending score.

    Raises:
        FloatingPointError: in training, a box or score among the best of a level is infinite or NaN.
    """
    scores, indices = select_top_anchors(pred_objectness_logits, len(image_sizes), pre_nms_topk)
    boxes = [take_rows(p[: len(image_sizes)], i) for p, i in zip(proposals, indices)]
    return suppress_proposals(boxes, scores, image_sizes, nms_thresh, post_nms_topk, min_box_size, training)


def select_top_anchors(
    logits: list[torch.Tensor], num_images: int, topk: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The `topk` best scores (N, K_i) of each level by descending score, and their indices (N, K_i)."""
    best = [x[:num_images].topk(min(topk, x.shape[1]), dim=1) for x in logits]
    return [b.values for b in best], [b.indices for b in best]


def take_rows(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows (N, K, D) of `values` (N, R, D) at `indices` (N, K)."""
    return values.gather(1, indices[..., None].expand(-1, -1, values.shape[-1]))


def suppress_proposals(
    boxes: list[torch.Tensor],
    scores: list[torch.Tensor],
    image_sizes: Sequence[tuple[int, int]],
    nms_thresh: float,
    post_nms_topk: int,
    min_box_size: float,
    training: bool,
) -> list[Instances]:
    """The part of `find_top_rpn_proposals` after the choice of the best anchors: `boxes` (N, K_i, 4) and
    `scores` (N, K_i) of each level are what is left of them.
    """
    levels = torch.cat([torch.full((b.shape[1],), i, device=b.device) for i, b in enumerate(boxes)])
    all_boxes, all_scores = torch.cat(boxes, dim=1), torch.cat(scores, dim=1)
    finite = all_boxes.isfinite().all(dim=2) & all_scores.isfinite()
    limits = all_boxes.new_tensor([(w, h, w, h) for h, w in image_sizes])
    all_boxes = all_boxes.clamp(min=0).minimum(limits[:, None])
    keep = finite & (all_boxes[..., 2:] - all_boxes[..., :2] > min_box_size).all(dim=2)

    # one synchronization with the device for the whole batch
    all_finite, *counts = torch.cat([finite.all()[None], keep.sum(dim=1)]).tolist()
    if training and not all_finite:
        raise FloatingPointError("Predicted boxes or scores contain Inf/NaN. Training has diverged.")
    image, index = keep.nonzero(as_tuple=True)
    candidates = zip(
        image_sizes,
        all_boxes[image, index].split(counts),
        all_scores[image, index].split(counts),
        levels[index].split(counts),
    )
    results = []
    for size, image_boxes, image_scores, image_levels in candidates:
        kept = batched_nms(image_boxes, image_scores, image_levels, nms_thresh)[:post_nms_topk]
        results.append(Instances(size, proposal_boxes=Boxes(image_boxes[kept]), objectness_logits=image_scores[kept]))
    return results


def add_ground_truth_to_proposals(gt: list[Instances] | list[Boxes], proposals: list[Instances]) -> list[Instances]:
    """Appends the ground-truth boxes of each image to its proposals, so that the heads see good boxes from the
    start.

    Args:
        gt: N ground truths: `Boxes`, or `Instances` with `gt_boxes` and every other field that the proposals
            have.
        proposals: N `Instances` with `proposal_boxes` and `objectness_logits`.

    Returns:
        N new `Instances` with the fields of the proposals.

    Raises:
        AssertionError: if a field of the proposals is missing in the ground truth.
    """
    if len(gt) != len(proposals):
        raise ValueError(f"got ground truth of {len(gt)} images for proposals of {len(proposals)} images")
    return [add_ground_truth_to_proposals_single_image(g, p) for g, p in zip(gt, proposals)]


def add_ground_truth_to_proposals_single_image(gt: Instances | Boxes, proposals: Instances) -> Instances:
    """As `add_ground_truth_to_proposals`, for one image."""
    fields = {} if isinstance(gt, Boxes) else gt.get_fields()
    boxes = gt if isinstance(gt, Boxes) else gt.gt_boxes
    device = proposals.objectness_logits.device
    extra = Instances(proposals.image_size, **fields)
    extra.proposal_boxes = boxes.to(device)
    extra.objectness_logits = torch.full((len(boxes),), _GT_LOGIT, device=device)
    for name in proposals.get_fields():
        assert extra.has(name), f"The proposals have the field '{name}' that the ground truth lacks"
    return Instances.cat([proposals, extra])
