"""Faster, Mask and Cascade R-CNN as a graph: proposals of any number, regions from the level that fits them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads

from .base import ExportError, register_export
from .detection import DetectionExport, by_anchor, clipped, grid_anchors, has_area, top_candidates
from .masks import MASK_THRESHOLD, pasted
from .suppression import ALL, NOTHING, rank_in_image, suppressed, suppressed_by_class


@register_export("GeneralizedRCNN")
class RCNNExport(DetectionExport):
    """Detectron2's GeneralizedRCNN with a region proposal network and its own heads."""

    def __init__(self, model: nn.Module) -> None:
        """See the base class.

        Raises:
            ExportError: proposals come from files, or the heads are of another kind.
        """
        super().__init__(model)
        heads: Any = model.roi_heads
        if model.proposal_generator is None:
            raise ExportError(
                "MODEL.PROPOSAL_GENERATOR.NAME is PrecomputedProposals: an exported network needs one that "
                "proposes regions itself, RPN."
            )
        if not isinstance(heads, (StandardROIHeads, CascadeROIHeads, Res5ROIHeads)):
            raise ExportError(f"MODEL.ROI_HEADS.NAME {type(heads).__name__} has no export to ONNX or TorchScript.")
        if getattr(heads, "keypoint_on", False):
            raise ExportError("MODEL.KEYPOINT_ON is True, and keypoints have no export: set it False.")
        if heads.mask_on:
            self.OUTPUTS = (*self.OUTPUTS, "masks")

    @property
    def num_classes(self) -> int:
        """See the base class."""
        return int(self.model.roi_heads.num_classes)

    @property
    def _predictors(self) -> Sequence[Any]:
        found = self.model.roi_heads.box_predictor
        return list(found) if isinstance(found, nn.ModuleList) else [found]

    @property
    def threshold(self) -> float:
        """See the base class."""
        return float(self._predictors[-1].test_score_thresh)

    def restore_threshold(self, threshold: float) -> None:
        """See the base class."""
        self._predictors[-1].test_score_thresh = threshold

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            images: (N, 3, H, W), see `Exported`.

        Returns:
            boxes (D, 4) in XYXY pixels, scores (D,) by decreasing score within each image, classes (D,) and number of
            the image (D,), int64; with a mask head which pixels are of each, (D, H, W) bool.
        """
        features = self.model.backbone(self.normalized(images))
        image, proposals = self.proposals(features, images)
        scores, boxes = self.regions(features, image, proposals, images)
        # back to a row of regions for each image, as many as there may be at most
        most = int(self.model.proposal_generator.post_nms_topk[False])
        place = image * most + rank_in_image(image, images.shape[0])
        scores, boxes = (
            x.new_full((1,), empty).expand(images.shape[0] * most, *x.shape[1:]).index_put((place,), x)
            for x, empty in ((scores, NOTHING), (boxes, 0.0))
        )
        scores, boxes = (x.reshape(images.shape[0], most, *x.shape[1:]) for x in (scores, boxes))
        last = self._predictors[-1]
        image, region, classes = suppressed_by_class(
            boxes,
            scores,
            float(last.test_score_thresh),
            float(last.test_nms_thresh),
            int(last.test_topk_per_image),
            self.for_onnx,
        )
        found = boxes[image, region, classes if boxes.shape[2] > 1 else torch.zeros_like(classes)]
        inside = has_area(found).nonzero()[:, 0]
        found, image, region, classes = found[inside], image[inside], region[inside], classes[inside]
        outputs = (found, scores[image, region, classes], classes, image)
        if not self.model.roi_heads.mask_on:
            return outputs
        return *outputs, pasted(self.masks(features, image, found, classes), found, images, MASK_THRESHOLD)

    def proposals(self, features: dict[str, Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the images (P,) of the proposals and the proposals (P, 4), best of each image first."""
        rpn: Any = self.model.proposal_generator
        maps = [features[name] for name in rpn.in_features]
        boxes, scores, levels = [], [], []
        generator = rpn.anchor_generator
        of_level = zip(maps, *rpn.rpn_head(maps), generator.cell_anchors, generator.strides)
        for level, (feature, logits, deltas, cell, stride) in enumerate(of_level):
            anchors = grid_anchors(feature, cell, stride, generator.offset)
            best, place = top_candidates(by_anchor(logits, 1).flatten(1).float(), int(rpn.pre_nms_topk[False]))
            chosen = by_anchor(deltas, 4).float().gather(1, place[..., None].expand(-1, -1, 4))
            boxes.append(moved_boxes(rpn.box2box_transform, chosen, anchors[place]))
            scores.append(best)
            levels.append(torch.full_like(place, level))
        candidates, groups = clipped(torch.cat(boxes, dim=1), images), torch.cat(levels, dim=1)
        score = torch.cat(scores, dim=1)
        score = torch.where(has_area(candidates, rpn.min_box_size), score, torch.full_like(score, NOTHING))
        limits = (ALL, float(rpn.nms_thresh), int(rpn.post_nms_topk[False]))
        image, index = suppressed(candidates, score, groups, len(maps), *limits, self.for_onnx)
        return image, candidates[image, index]

    def regions(
        self, features: dict[str, Tensor], image: Tensor, proposals: Tensor, images: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns (P, K) scores of the proposals, and (P, K, 4) or (P, 1, 4) boxes, clipped to the images."""
        heads: Any = self.model.roi_heads
        stages, boxes = [], proposals
        for stage, predictor in enumerate(self._predictors):
            if stage > 0:  # each stage of a cascade reads where the one before it has moved the box
                boxes = clipped(boxes[:, 0], images)
            if isinstance(heads, Res5ROIHeads):
                vectors = heads.res5(self.pooled(heads.pooler, heads.in_features, features, image, boxes))
                vectors = vectors.mean(dim=[2, 3])
            else:
                head = heads.box_head[stage] if isinstance(heads.box_head, nn.ModuleList) else heads.box_head
                vectors = head(self.pooled(heads.box_pooler, heads.box_in_features, features, image, boxes))
            logits, deltas = (x.float() for x in predictor(vectors))
            sigmoid = getattr(predictor, "use_sigmoid_ce", False)
            stages.append((logits.sigmoid() if sigmoid else logits.softmax(1))[:, :-1])
            number = 1 if deltas.shape[1] == 4 else self.num_classes
            boxes = moved_boxes(predictor.box2box_transform, deltas.reshape(-1, number, 4), boxes[:, None])
        return torch.stack(stages).mean(0), clipped(boxes, images)

    def pooled(
        self, pooler: Any, names: Sequence[str], features: dict[str, Tensor], image: Tensor, boxes: Tensor
    ) -> Tensor:
        """Returns features (P, C, S, S) of boxes (P, 4), each from the level of its size (equation 1 of FPN)."""
        maps = [features[name].float() for name in names]
        rois = torch.cat([image[:, None].to(boxes.dtype), boxes], dim=1)
        dtype = next(self.model.parameters()).dtype
        if len(maps) == 1:
            return pooler.level_poolers[0](maps[0], rois).to(dtype)
        sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        # the small term keeps the logarithm finite for boxes without area
        level = (pooler.canonical_level + torch.log2(sides / pooler.canonical_box_size + 1e-8)).floor()
        level = level.clamp(min=pooler.min_level, max=pooler.max_level) - pooler.min_level
        places = [(level == number).nonzero()[:, 0] for number in range(len(maps))]
        parts = [pool(x, rois[place]) for pool, x, place in zip(pooler.level_poolers, maps, places)]
        return torch.cat(parts)[torch.cat(places).sort()[1]].to(dtype)

    def masks(self, features: dict[str, Tensor], image: Tensor, boxes: Tensor, classes: Tensor) -> Tensor:
        """Returns the probabilities (D, M, M) of the masks of detections, inside their boxes."""
        heads: Any = self.model.roi_heads
        if isinstance(heads, Res5ROIHeads):
            inputs = heads.res5(self.pooled(heads.pooler, heads.in_features, features, image, boxes))
        else:
            inputs = self.pooled(heads.mask_pooler, heads.mask_in_features, features, image, boxes)
        logits = heads.mask_head.layers(inputs).float()
        index = classes if logits.shape[1] > 1 else torch.zeros_like(classes)
        return logits[torch.arange(logits.shape[0], device=logits.device), index].sigmoid()


def moved_boxes(transform: Any, deltas: Tensor, boxes: Tensor) -> Tensor:
    """What Detectron2's `Box2BoxTransform` makes of boxes (arXiv 1311.2524, appendix C), also of none at all.

    Args:
        transform: for its weights and largest logarithm of a size.
        deltas: (..., 4).
        boxes: (..., 4), which are broadcast.
    """
    weights = torch.tensor(tuple(transform.weights), device=deltas.device)
    size = boxes[..., 2:] - boxes[..., :2]
    shift, growth = (deltas / weights).split(2, dim=-1)
    center = boxes[..., :2] + 0.5 * size + shift * size
    half = 0.5 * growth.clamp(max=transform.scale_clamp).exp() * size
    return torch.cat([center - half, center + half], dim=-1)
