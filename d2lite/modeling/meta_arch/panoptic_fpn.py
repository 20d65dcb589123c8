"""Panoptic FPN (arXiv 1901.02446): an R-CNN for things and a semantic branch for stuff on one backbone."""

import logging
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from d2lite.config import CfgNode, configurable
from d2lite.modeling.meta_arch.build import META_ARCH_REGISTRY
from d2lite.modeling.meta_arch.inputs import output_size, semantic_labels
from d2lite.modeling.meta_arch.rcnn import GeneralizedRCNN
from d2lite.modeling.meta_arch.semantic_seg import build_sem_seg_head
from d2lite.modeling.postprocessing import detector_postprocess, sem_seg_postprocess
from d2lite.structures import Instances

__all__ = ["PanopticFPN", "combine_semantic_and_instance_outputs"]

logger = logging.getLogger(__name__)


@META_ARCH_REGISTRY.register()
class PanopticFPN(GeneralizedRCNN):
    """Instances, per-pixel classes, and both merged into one segmentation.

    It takes what `GeneralizedRCNN` does, and in training "sem_seg" (H, W): 0 for all things, stuff classes from 1.
    In training it returns a dict of losses, otherwise one dict per image: "instances", "sem_seg" (logits (C, H, W))
    and "panoptic_seg" as returned by `combine_semantic_and_instance_outputs`.
    """

    @configurable
    def __init__(
        self,
        *,
        sem_seg_head: nn.Module,
        combine_overlap_thresh: float = 0.5,
        combine_stuff_area_thresh: float = 4096,
        combine_instances_score_thresh: float = 0.5,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            sem_seg_head: turns features (and, in training, labels) into (scores, losses).
            combine_overlap_thresh, combine_stuff_area_thresh, combine_instances_score_thresh: see
                `combine_semantic_and_instance_outputs`.
            kwargs: the arguments of `GeneralizedRCNN`.
        """
        super().__init__(**kwargs)
        self.sem_seg_head = sem_seg_head
        self.combine_overlap_thresh = combine_overlap_thresh
        self.combine_stuff_area_thresh = combine_stuff_area_thresh
        self.combine_instances_score_thresh = combine_instances_score_thresh

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        args = super().from_config(cfg)
        combine = cfg.MODEL.PANOPTIC_FPN.COMBINE
        if not combine.ENABLED:
            logger.warning(
                "MODEL.PANOPTIC_FPN.COMBINE.ENABLED has no effect; call inference(..., do_postprocess=False) instead."
            )
        _scale_instance_losses(args["roi_heads"], cfg.MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT)
        return {
            **args,
            "sem_seg_head": build_sem_seg_head(cfg, args["backbone"].output_shape()),
            "combine_overlap_thresh": combine.OVERLAP_THRESH,
            "combine_stuff_area_thresh": combine.STUFF_AREA_LIMIT,
            "combine_instances_score_thresh": combine.INSTANCES_CONFIDENCE_THRESH,
        }

    def _losses(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor]:
        images, features = self.extract_features(batched_inputs)
        truth = self._ground_truth(batched_inputs)
        labels = semantic_labels(batched_inputs, self.backbone, self.device, self.sem_seg_head)
        stuff_losses = self.sem_seg_head(features, labels)[1]
        proposals, losses = self._propose(batched_inputs, images, features, truth)
        return {**stuff_losses, **losses, **self.roi_heads(images, features, proposals, truth)[1]}

    def inference(
        self, batched_inputs: list[dict], do_postprocess: bool = True
    ) -> list[dict] | tuple[list[Instances], torch.Tensor]:
        """
        Args:
            batched_inputs: as in `forward`.
            do_postprocess: whether predictions are mapped to the wanted resolution and merged.

        Returns:
            As `forward`; without postprocessing the instances of each image and the logits (N, C, H, W).
        """
        assert not self.training, "inference was called on a model in training mode; call model.eval() first"
        images, features = self.extract_features(batched_inputs)
        logits = self.sem_seg_head(features, None)[0]
        proposals = self._propose(batched_inputs, images, features, None)[0]
        things = self.roi_heads(images, features, proposals, None)[0]
        if not do_postprocess:
            return things, logits
        return [
            self._merge(scores, found, size, *output_size(x, size))
            for scores, found, x, size in zip(logits, things, batched_inputs, images.image_sizes)
        ]

    def _merge(
        self, sem_seg: torch.Tensor, instances: Instances, image_size: tuple[int, int], height: int, width: int
    ) -> dict:
        sem_seg = sem_seg_postprocess(sem_seg, image_size, height, width)
        instances = detector_postprocess(instances, height, width)
        limits = (self.combine_overlap_thresh, self.combine_stuff_area_thresh, self.combine_instances_score_thresh)
        panoptic = combine_semantic_and_instance_outputs(instances, sem_seg.argmax(dim=0), *limits)
        return {"sem_seg": sem_seg, "instances": instances, "panoptic_seg": panoptic}


def combine_semantic_and_instance_outputs(
    instance_results: Instances,
    semantic_results: torch.Tensor,
    overlap_threshold: float,
    stuff_area_thresh: float,
    instances_score_thresh: float,
) -> tuple[torch.Tensor, list[dict]]:
    """Merges detections and per-pixel classes: instances claim free pixels by decreasing score, then stuff fills
    the rest (arXiv 1901.02446, section 3.2).

    Args:
        instance_results: with `scores`, `pred_classes` and `pred_masks` (N, H, W) bool.
        semantic_results: (H, W) stuff classes, 0 for things.
        overlap_threshold: instances of which a larger part is already taken are dropped.
        stuff_area_thresh: stuff regions with fewer pixels are dropped.
        instances_score_thresh: instances with a lower score are dropped.

    Returns:
        panoptic_seg: (H, W) int32 ids of segments; 0 for none.
        segments_info: for each segment a dict with "id", "isthing" and "category_id"; things also have
            "score" and "instance_id" (their index in `instance_results`), stuff has "area".
    """
    ids = torch.zeros(semantic_results.shape, dtype=torch.int32, device=semantic_results.device)
    segments: list[dict] = []

    def claim(pixels: torch.Tensor, **properties: Any) -> None:
        segments.append({"id": len(segments) + 1, **properties})
        ids[pixels] = len(segments)

    masks = instance_results.pred_masks.to(dtype=torch.bool, device=ids.device)
    scores, order = instance_results.scores.sort(descending=True)
    best_first = zip(order.tolist(), scores.tolist(), instance_results.pred_classes[order].tolist())
    for index, score, category in takewhile(lambda found: found[1] >= instances_score_thresh, best_first):
        free = masks[index] & (ids == 0)
        area, free_area = torch.stack([masks[index].sum(), free.sum()]).tolist()
        if area > 0 and (area - free_area) / area <= overlap_threshold:
            claim(free, isthing=True, score=score, category_id=category, instance_id=index)

    free_labels = semantic_results.masked_fill(ids != 0, 0)
    labels, areas = free_labels.unique(return_counts=True)
    for label, area in zip(labels.tolist(), areas.tolist()):
        if label != 0 and area >= stuff_area_thresh:
            claim(free_labels == label, isthing=False, category_id=label, area=area)
    return ids, segments


def _scale_instance_losses(roi_heads: nn.Module, weight: float) -> None:
    """Applies MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT to all losses of the box and mask heads."""
    if weight == 1.0:
        return
    for head in roi_heads.modules():
        own = getattr(head, "loss_weight", None)
        if isinstance(own, dict):
            own = {"loss_cls": 1.0, "loss_box_reg": 1.0, **own}  # what is not listed has weight 1
            head.loss_weight = {name: value * weight for name, value in own.items()}
        elif own is not None:
            head.loss_weight = own * weight
